"""Figures of notebook 01: the plane, probes by layer, controls, the transfer matrix, and probes against gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from casa_mech.figures import BENIGN, HARMFUL, MARKERS, SERIES, bar_lengths, style, titled
from casa_mech.judging.estimate import Estimate
from probes.linear.harm_and_refusal import DIRECTIONS, HARM, REFUSAL
from probes.linear.plots import POSITIONS
from probes.linear.plots import plot_probes as plot_probes
from probes.linear.thresholds import BENIGN_FLAGGED, HARMFUL_FLAGGED, RANKING

_LINES: dict[str, tuple[str, str, str, Any]] = {
    "auroc": ("logistic probe", "low", "high", "-"),
    "mean_difference": ("difference in means", "", "", "--"),
    "matched": ("logistic probe, prompts of equal length", "matched_low", "matched_high", "-."),
    "untrained": ("logistic probe, random weights", "untrained_low", "untrained_high", (0, (5, 1, 1, 1, 1, 1))),
    "length": ("prompt length alone", "length_low", "length_high", ":"),
}


def plot_matrix(data: pd.DataFrame, title: str, caption: str = "", at_most: int = 5) -> Figure:
    """Transfer matrices: a panel for each site and choice of positions, fitted down, judged across, AUROC in the cell.

    Args:
        data: columns `positions, site, fit, surface, auroc, low, high, n`.
        title: the claim.
        caption: what stands behind it.
        at_most: sites that are drawn, spread evenly over the depth; the CSV beside the figure has all.
    """
    sites = _spread(list(dict.fromkeys(data["site"])), at_most)
    surfaces, rows = list(dict.fromkeys(data["fit"])), list(dict.fromkeys(data["positions"]))
    with style():
        size = (2.3 * len(sites) + 0.6, 2.4 * len(rows) + 0.5)
        figure, axes = plt.subplots(len(rows), len(sites), figsize=size, squeeze=False)
        for line, positions in zip(axes, rows, strict=True):
            for axis, site in zip(line, sites, strict=True):
                panel = data[(data["positions"] == positions) & (data["site"] == site)]
                _matrix(axis, panel, surfaces)
                axis.set_title(f"layer {site}")
            line[0].set_ylabel(f"{POSITIONS.get(positions, positions)}\nfitted on")
        for axis in axes[-1]:
            axis.set_xlabel(f"judged on (n = {int(data['n'].min())})")
        return titled(figure, title, f"{caption} Cells: AUROC on unseen topics [95 % interval].")


def plot_controls(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Probes beside their controls by layer: a column a surface, a row a choice of positions.

    Args:
        data: columns `positions, site, surface, n`, `permuted_low, permuted_high`, and `auroc`, `mean_difference`,
            `matched`, `untrained`, `length` with their intervals (`tables.control_table`).
        title: the claim.
        caption: what stands behind it.
    """
    surfaces, rows = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["positions"]))
    with style():
        size = (3.3 * len(surfaces), 2.9 * len(rows))
        figure, axes = plt.subplots(len(rows), len(surfaces), figsize=size, sharey=True, squeeze=False)
        for line, positions in zip(axes, rows, strict=True):
            for axis, surface in zip(line, surfaces, strict=True):
                panel = data[(data["positions"] == positions) & (data["surface"] == surface)]
                _controls(axis, panel)
                axis.set_title(f"{surface} (n = {int(panel['n'].iloc[0])})")
            line[0].set_ylabel(f"{POSITIONS.get(positions, positions)}\nAUROC, unseen topics")
        for axis in axes[-1]:
            axis.set_xlabel("layer (norm: after the final norm)")
        return titled(figure, title, f"{caption} Bands: 95 % intervals.", legend_of=axes[0][0])


def plot_prediction(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Transfer of the text probe (across) and of CASA (up), a point a gate and surface, with 95 % intervals.

    Args:
        data: `probes.linear.gate_transfer.POINT_COLUMNS`.
        title: the claim.
        caption: what stands behind it.
    """
    models, surfaces = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["surface"]))
    longest = data["steps"].max()
    with style():
        figure, axis = plt.subplots(figsize=(6.4, 4.6))
        for row in data.itertuples():
            colour = SERIES[models.index(row.model) % len(SERIES)]
            across = np.clip([[row.probe - row.probe_low], [row.probe_high - row.probe]], 0, None)
            upwards = np.clip([[row.casa - row.casa_low], [row.casa_high - row.casa]], 0, None)
            axis.errorbar(
                row.probe, row.casa, xerr=across, yerr=upwards, fmt=MARKERS[surfaces.index(row.surface)], color=colour,
                markerfacecolor=colour if row.steps == longest else "white", markersize=5, elinewidth=0.6, alpha=0.85,
            )  # fmt: skip
        ends = [min(data["probe_low"].min(), data["casa_low"].min(), 0.5), 1.0]
        axis.plot(ends, ends, color="grey", linewidth=0.8, zorder=0)
        axis.set_xlabel(f"AUROC of the text probe there, gate's layer (n = {int(data['n'].min())} a point)")
        axis.set_ylabel("AUROC of v_s there, gate trained on text")
        handles = [_key(name, colour=SERIES[place % len(SERIES)], marker="s") for place, name in enumerate(models)]
        handles += [_key(name, marker=MARKERS[place]) for place, name in enumerate(surfaces)]
        handles += [_key(f"{longest} steps")]
        handles += [_key(f"{steps} steps", filled=False) for steps in sorted(set(data["steps"]) - {longest})]
        axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return titled(figure, title, f"{caption} Bars: 95 % intervals; the line: equal AUROCs.")


def _key(label: str, colour: str = "grey", marker: str = "o", filled: bool = True) -> Line2D:
    face = colour if filled else "white"
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="", label=label)


def _matrix(axis: Axes, panel: pd.DataFrame, surfaces: Sequence[str]) -> None:
    cells = panel.set_index(["fit", "surface"])
    values = np.array([[cells.at[(fit, on), "auroc"] for on in surfaces] for fit in surfaces])
    axis.imshow(values, vmin=0.5, vmax=1.0, cmap="cividis")
    for row, fit in enumerate(surfaces):
        for column, on in enumerate(surfaces):
            cell = cells.loc[(fit, on)]
            text = f"{cell['auroc']:.2f}\n{Estimate(*cell[['auroc', 'low', 'high']]).bounds()}"
            dark = cell["auroc"] < 0.75
            axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
    axis.set_xticks(range(len(surfaces)), surfaces)
    axis.set_yticks(range(len(surfaces)), surfaces)
    axis.grid(False)


def _controls(axis: Axes, panel: pd.DataFrame) -> None:
    x = np.arange(len(panel))
    for number, (column, (name, low, high, dash)) in enumerate(_LINES.items()):
        look: dict[str, Any] = {"linestyle": dash, "marker": MARKERS[number], "color": SERIES[number]}
        axis.plot(x, panel[column], markersize=4, label=name, **look)
        if low:
            axis.fill_between(x, panel[low], panel[high], color=SERIES[number], alpha=0.15, linewidth=0)
    axis.fill_between(
        x, panel["permuted_low"], panel["permuted_high"], color="grey", alpha=0.3, label="labels permuted"
    )
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set_xticks(x, panel["site"])
    axis.set_ylim(top=1.02)


def _spread(names: Sequence[str], at_most: int) -> list[str]:
    places = np.unique(np.linspace(0, len(names) - 1, min(at_most, len(names))).round().astype(int))
    return [names[place] for place in places]


def plot_planes(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Harmful and benign queries in the PCA plane: a column a surface, a row (and a plane) a choice of positions.

    Args:
        data: columns `positions, surface, label, x, y, explained_x, explained_y, silhouette`, one row a query.
        title: the claim.
        caption: what stands behind it.
    """
    surfaces, rows = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["positions"]))
    with style():
        size = (3.4 * len(surfaces), 3.1 * len(rows))
        figure, axes = plt.subplots(len(rows), len(surfaces), figsize=size, sharex="row", sharey="row", squeeze=False)
        for line, positions in zip(axes, rows, strict=True):
            here = data[data["positions"] == positions]
            for axis, surface in zip(line, surfaces, strict=True):
                panel = here[here["surface"] == surface]
                for label, colour, marker in (("harmful", HARMFUL, "^"), ("benign", BENIGN, "o")):
                    requests = panel[panel["label"] == label]
                    name = f"{label} (n = {len(requests)} a panel)"
                    axis.scatter(
                        requests["x"], requests["y"], s=14, c=colour, marker=marker, alpha=0.6, linewidths=0, label=name
                    )
                axis.set_title(f"{surface}: silhouette {panel['silhouette'].iloc[0]:.2f}")
                axis.set_xlabel(f"PC 1 ({here['explained_x'].iloc[0]:.0%} of variance)")
            share = f"PC 2 ({here['explained_y'].iloc[0]:.0%} of variance)"
            line[0].set_ylabel(f"{POSITIONS.get(positions, positions)}\n{share}")
        how = "Points: requests. One plane a row, so that its panels share their axes."
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def plot_thresholds(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Shares that a text probe flags at its own threshold: a row a model, a column a choice of positions.

    Args:
        data: columns `model, positions, surface, states, measure, n, value, low, high` (`tables.threshold_data`).
        title: the claim.
        caption: what stands behind it.
    """
    models, columns = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["positions"]))
    with style():
        size = (5 * len(columns), 3.1 * len(models))
        figure, axes = plt.subplots(len(models), len(columns), figsize=size, sharey=True, squeeze=False)
        for line, model in zip(axes, models, strict=True):
            for axis, positions in zip(line, columns, strict=True):
                _flagged(axis, data[(data["model"] == model) & (data["positions"] == positions)])
                axis.set(title=f"{model}, {POSITIONS.get(positions, positions)}", ylim=(0, 104))
            line[0].set_ylabel("flagged by a probe of text, %")
        return titled(figure, title, f"{caption} Bars: 95 % intervals over topics.", legend_of=axes[0][0])


def _flagged(axis: Axes, panel: pd.DataFrame) -> None:
    groups = list(dict.fromkeys(zip(panel["surface"], panel["states"], strict=True)))
    cells = panel.set_index(["measure", "surface", "states"])
    for shift, measure, colour, hatch in ((-0.2, HARMFUL_FLAGGED, HARMFUL, "//"), (0.2, BENIGN_FLAGGED, BENIGN, "")):
        bars = cells.loc[[(measure, *group) for group in groups]]
        axis.bar(
            np.arange(len(groups)) + shift, 100 * bars["value"], 0.38, yerr=100 * bar_lengths(bars), capsize=2,
            color=colour, hatch=hatch, label=f"{measure} (n = {int(bars['n'].min())} a bar)",
        )  # fmt: skip
    names = [
        f"{surface}\n{states}\nAUROC {cells.loc[(RANKING, surface, states), 'value']:.2f}" for surface, states in groups
    ]
    axis.set_xticks(np.arange(len(groups)), names, fontsize=8)


def plot_kinds(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """AUROC of a text probe on kinds that it has not met: a panel a choice of positions, a marker a surface.

    Args:
        data: columns `positions, surface, kind, auroc, low, high, n` (`tables.kind_data`).
        title: the claim.
        caption: what stands behind it.
    """
    rows, surfaces = list(dict.fromkeys(data["positions"])), list(dict.fromkeys(data["surface"]))
    kinds = list(dict.fromkeys(data["kind"]))
    with style():
        figure, axes = plt.subplots(1, len(rows), figsize=(5 * len(rows), 3.4), sharey=True, squeeze=False)
        for axis, positions in zip(axes[0], rows, strict=True):
            for number, surface in enumerate(surfaces):
                panel = data[(data["positions"] == positions) & (data["surface"] == surface)]
                points = panel.set_index("kind").reindex(kinds)
                axis.errorbar(
                    np.arange(len(kinds)) + 0.18 * (number - (len(surfaces) - 1) / 2), points["auroc"],
                    yerr=bar_lengths(points, "auroc"), fmt=MARKERS[number], color=SERIES[number], capsize=2,
                    markersize=4.5, label=f"{surface} (n = {int(points['n'].min())} to {int(points['n'].max())})",
                )  # fmt: skip
            axis.axhline(0.5, color="grey", linewidth=0.8)
            axis.set_xticks(np.arange(len(kinds)), kinds, rotation=30, ha="right")
            axis.set(title=POSITIONS.get(positions, positions), xlabel="left out of the fit")
        axes[0][0].set_ylabel("AUROC on what was left out")
        return titled(figure, title, f"{caption} Bars: 95 % intervals.", legend_of=axes[0][0])


def plot_differences(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Length and direction of the difference of class means by layer: a row a model and choice of positions.

    Args:
        data: columns `model, positions, site, surface, measure, n, value, low, high` (`tables.difference_data`).
        title: the claim.
        caption: what stands behind it.
    """
    rows = list(dict.fromkeys(zip(data["model"], data["positions"], strict=True)))
    surfaces, sites = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["site"]))
    names = {"length": "length, spreads on text", "shrinkage": "length / text's", "cosine": "cosine with text's"}
    with style():
        size = (3.4 * len(names), 2.5 * len(rows))
        figure, axes = plt.subplots(len(rows), len(names), figsize=size, sharey="col", squeeze=False)
        for line, (model, positions) in zip(axes, rows, strict=True):
            here = data[(data["model"] == model) & (data["positions"] == positions)]
            for axis, (measure, name) in zip(line, names.items(), strict=True):
                panel = here[here["measure"] == measure]
                for surface in dict.fromkeys(panel["surface"]):
                    points = panel[panel["surface"] == surface].set_index("site").reindex(sites)
                    _curve(axis, points, "value", surfaces.index(surface), f"{surface} (n = {int(points['n'].max())})")
                axis.set_xticks(np.arange(len(sites)), sites)
                axis.set_ylabel(name)
            line[0].set_title(f"{model}, {POSITIONS.get(positions, positions)}", loc="left")
        for axis in axes[-1]:
            axis.set_xlabel("layer (norm: after the final norm)")
        return titled(figure, title, f"{caption} Bands: 95 % intervals over topics.", legend_of=axes[0][0])


def plot_directions(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """AUROC of the harm and the refusal direction on both contrasts by layer: a column a surface, a row a position.

    Args:
        data: columns `positions, site, surface, direction, contrast, auroc, low, high, n` (`tables.direction_data`).
        title: the claim.
        caption: what stands behind it.
    """
    rows, surfaces = list(dict.fromkeys(data["positions"])), list(dict.fromkeys(data["surface"]))
    sites = list(dict.fromkeys(data["site"]))
    contrasts = {HARM: "harm, both answered", REFUSAL: "refusal, both harmful"}
    with style():
        size = (3.3 * len(surfaces), 2.8 * len(rows))
        figure, axes = plt.subplots(len(rows), len(surfaces), figsize=size, sharey=True, squeeze=False)
        for line, positions in zip(axes, rows, strict=True):
            for axis, surface in zip(line, surfaces, strict=True):
                panel = data[(data["positions"] == positions) & (data["surface"] == surface)]
                for number, (contrast, name) in enumerate(contrasts.items()):
                    for direction in DIRECTIONS:
                        chosen = (panel["contrast"] == contrast) & (panel["direction"] == direction)
                        points = panel[chosen].set_index("site").reindex(sites)
                        dash = "-" if direction == contrast else ":"
                        _curve(axis, points, "auroc", number, f"{direction} direction on {name}", dash)
                counts = panel.groupby("contrast", sort=False)["n"].first()
                axis.set_title(f"{surface} (n = {', '.join(f'{name} {int(n)}' for name, n in counts.items())})")
                axis.axhline(0.5, color="grey", linewidth=0.8)
                axis.set_xticks(np.arange(len(sites)), sites)
            line[0].set_ylabel(f"{POSITIONS.get(positions, positions)}\nAUROC, unseen topics")
        for axis in axes[-1]:
            axis.set_xlabel("layer (norm: after the final norm)")
        return titled(figure, title, f"{caption} Bands: 95 % intervals over topics.", legend_of=axes[0][0])


def _curve(axis: Axes, points: pd.DataFrame, value: str, number: int, name: str, dash: str = "-") -> None:
    x = np.arange(len(points))
    axis.plot(x, points[value], dash, color=SERIES[number], marker=MARKERS[number], markersize=4, label=name)
    axis.fill_between(x, points["low"], points["high"], color=SERIES[number], alpha=0.15, linewidth=0)
