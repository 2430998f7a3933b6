"""Figures of the lens: the safety tokens through depth, how well the lenses read, heads, and what heads look at."""

from __future__ import annotations

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.figures import LABEL_COLOURS, MARKERS, SERIES, bar_lengths, style, titled
from casa_mech.reports.lens.tables import FROM_TEXT
from probes.lens.heads import PATTERN_ROLES
from probes.lens.logit import LOGIT_LENS, TUNED_LENS

LENSES = {TUNED_LENS: "-", FROM_TEXT: "--", LOGIT_LENS: ":"}
"""Solid where the translators were fitted on the surface that is read."""
COLOURS = {**LABEL_COLOURS, "both": SERIES[5]}
MEASURES = {"logit": "logit (unsafe - safe)", "v_s": "v_s"}


def plot_depth(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """The token difference and its AUROC by depth: a column a surface, all lenses, with 95 % intervals.

    Args:
        data: columns `measure` ("difference" or "auroc"), `label` ("both" for an AUROC), and `surface, lens, site,
            depth, n, value, low, high`.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    names = {"difference": "unsafe - safe logit", "auroc": "AUROC of the difference"}
    with style():
        figure, axes = plt.subplots(2, len(surfaces), figsize=(3 * len(surfaces), 5.4), sharex=True, sharey="row")
        axes = axes.reshape(2, -1)
        for (row, measure), (column, surface) in product(enumerate(names), enumerate(surfaces)):
            panel = data[(data["measure"] == measure) & (data["surface"] == surface)]
            for label, lens in product(dict.fromkeys(panel["label"]), LENSES):
                name = f"{lens}, {label}" if label != "both" else f"{lens}, both"
                rows = panel[(panel["label"] == label) & (panel["lens"] == lens)]
                _line(axes[row, column], rows, COLOURS[label], LENSES[lens], name)
            axes[row, column].axhline(0.5 if measure == "auroc" else 0, color="grey", linewidth=0.8)
        for axis, surface in zip(axes[0], surfaces, strict=True):
            axis.set_title(f"{surface} (n = {int(data[data['surface'] == surface]['n'].max())})")
        for axis, name in zip(axes[:, 0], names.values(), strict=True):
            axis.set_ylabel(name)
        _depths(axes[1], data)
        return titled(figure, title, f"{caption} Bands: 95 % intervals by bootstrap over topics.", legend_of=axes[0][0])


def plot_quality(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """KL from the model's own prediction to each lens's, by depth and surface, with 95 % intervals.

    Args:
        data: columns `surface, lens, site, depth, n, value, low, high`; the last depth, which is 0, left out.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    with style():
        figure, axes = plt.subplots(1, len(surfaces), figsize=(3 * len(surfaces), 3.2), sharey=True, squeeze=False)
        for axis, surface in zip(axes[0], surfaces, strict=True):
            panel = data[data["surface"] == surface]
            for number, lens in enumerate(LENSES):
                _line(axis, panel[panel["lens"] == lens], SERIES[number], LENSES[lens], lens, MARKERS[number])
            axis.set(yscale="log", title=f"{surface} (n = {int(panel['n'].max())})")
        axes[0][0].set_ylabel("KL(model || lens), nats a position")
        _depths(axes[0], data)
        return titled(figure, title, f"{caption} Bands: 95 % intervals by bootstrap over topics.", legend_of=axes[0][0])


def plot_heads(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Every head's mean support of the right side: a row a measure, a column a surface; dots where p (Holm) < 0.05.

    Args:
        data: columns `surface, measure, layer, head, n, mean, low, high, p_holm`.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces, measures = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["measure"]))
    layers, heads = int(data["layer"].max()) + 1, int(data["head"].max()) + 1
    size = (max(2.6, 0.4 * heads + 1) * len(surfaces), max(2.2, 0.28 * layers + 1) * len(measures))
    with style():
        figure, axes = plt.subplots(len(measures), len(surfaces), figsize=size, sharex=True, sharey=True, squeeze=False)
        for line, measure in zip(axes, measures, strict=True):
            rows = data[data["measure"] == measure]
            reach = float(rows["mean"].abs().max()) or 1.0
            for axis, surface in zip(line, surfaces, strict=True):
                panel = rows[rows["surface"] == surface]
                grid = panel.pivot_table(index="layer", columns="head", values="mean")
                image = axis.imshow(grid, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
                sure = panel[panel["p_holm"] < 0.05]
                axis.plot(sure["head"], sure["layer"], ".", color="black", markersize=4, linestyle="none")
                axis.set_title(f"{surface} (n = {int(panel['n'].max())})")
                axis.grid(False)
            figure.colorbar(image, ax=line[-1], label=f"support, {MEASURES.get(measure, measure)}")
            line[0].set_ylabel("layer")
        for axis in axes[-1]:
            axis.set_xlabel("head")
            axis.set_xticks(np.arange(0, heads, max(1, heads // 8)))
            axis.set_yticks(np.arange(0, layers, max(1, layers // 8)))
        return titled(figure, title, f"{caption} Dots: p < 0.05 after Holm's correction over the heads.")


def plot_attention(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Where heads look from the gate's position: a row a head, a column a surface, a bar a role, with 95 % intervals.

    Args:
        data: columns `surface, layer, head, label, role, n, value, low, high`.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces = list(dict.fromkeys(data["surface"]))
    roles = [role for role in PATTERN_ROLES if role in set(data["role"])]
    heads = list(dict.fromkeys(zip(data["layer"], data["head"], strict=True)))
    with style():
        size = (3 * len(surfaces), 2.1 * len(heads) + 0.6)
        figure, axes = plt.subplots(len(heads), len(surfaces), figsize=size, sharex=True, sharey=True, squeeze=False)
        for line, (layer, head) in zip(axes, heads, strict=True):
            line[0].set_ylabel(f"layer {layer}, head {head}\nshare of attention")
            for axis, surface in zip(line, surfaces, strict=True):
                panel = data[(data["surface"] == surface) & (data["layer"] == layer) & (data["head"] == head)]
                for shift, label in ((-0.18, "harmful"), (0.18, "benign")):
                    rows = panel[panel["label"] == label].set_index("role").reindex(roles)
                    error = bar_lengths(rows)
                    name = f"{label} (n = {int(rows['n'].max())} a panel)"
                    axis.bar(
                        np.arange(len(roles)) + shift, rows["value"], 0.34, yerr=error, capsize=2,
                        color=COLOURS[label], hatch="//" if label == "harmful" else "", label=name,
                    )  # fmt: skip
        for axis, surface in zip(axes[0], surfaces, strict=True):
            axis.set_title(surface)
        for axis in axes[-1]:
            axis.set_xticks(np.arange(len(roles)), roles, rotation=30)
        return titled(figure, title, f"{caption} Bars: 95 % intervals over topics.", legend_of=axes[0][0])


def _line(axis: Axes, rows: pd.DataFrame, colour: str, dash: str, name: str, marker: str = "o") -> None:
    rows = rows.sort_values("depth")
    axis.plot(rows["depth"], rows["value"], dash, color=colour, marker=marker, markersize=3, label=name)
    axis.fill_between(rows["depth"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)


def _depths(axes: np.ndarray, data: pd.DataFrame) -> None:
    sites = data.drop_duplicates("depth").sort_values("depth")
    step = max(1, len(sites) // 8)
    for axis in axes:
        axis.set_xticks(sites["depth"][::step], sites["site"].replace("embeddings", "in")[::step])
        axis.set_xlabel("after block (in: before block 0)")
