"""Figures of what a prefill does: by its length, by token, by depth, and by the attention that it works through."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.figures import LABEL_COLOURS, MARKERS, SERIES, style, titled
from casa_mech.reports.prefill_dynamics.tables import DIFFERENCE, RANDOM, THESE

DASHES = {"harmful": "-", "benign": "--", DIFFERENCE: "-"}
BANDS = "Solid: harmful, dashed: benign counterparts. Bands: 95 % intervals over topics and wordings."
DIFFERENCE_BANDS = "Harmful minus benign counterpart. Bands: 95 % intervals over topics and wordings."


def plot_lengths(
    data: pd.DataFrame, title: str, caption: str = "", labels: Sequence[str] = ("harmful", "benign")
) -> Figure:
    """Every measure by the prefill's length, with intervals: a panel a measure, a line a system and label.

    Args:
        data: of `tables.length_data`.
        title: the claim.
        caption: what stands behind it.
        labels: those that are drawn: both, or `(DIFFERENCE,)`.
    """
    data = data[data["label"].isin(labels)]
    measures = list(dict.fromkeys(data["measure"]))
    names = list(dict.fromkeys(data["system"]))
    with style():
        rows = -(-len(measures) // 3)
        figure, axes = plt.subplots(rows, 3, figsize=(11, 3.1 * rows), squeeze=False)
        for axis, measure in zip(axes.flat, measures, strict=False):
            panel = data[data["measure"] == measure]
            for (name, label), lines in panel.groupby(["system", "label"], sort=False):
                shown = str(name) if label == labels[0] else ""
                _line(axis, lines["length"], lines, names.index(str(name)), DASHES[str(label)], shown)
            axis.set(xlabel="prefilled tokens", title=f"{_broken(measure)} (n = {panel['n'].min()})")
            if DIFFERENCE in labels:
                axis.axhline(0, color="grey", linewidth=0.8)
        for axis in axes.flat[len(measures) :]:
            axis.axis("off")
        how = DIFFERENCE_BANDS if DIFFERENCE in labels else BANDS
        return titled(figure, title, f"{caption} {how}", legend_of=axes.ravel())


def plot_tokens(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Every measure by generated token: a row a measure, a column a system, a line a length of prefill and label.

    Args:
        data: of `tables.token_data`.
        title: the claim.
        caption: what stands behind it.
    """
    data = data[data["label"] != DIFFERENCE]
    measures, systems = list(dict.fromkeys(data["measure"])), list(dict.fromkeys(data["system"]))
    lengths = sorted(data["length"].unique())
    with style():
        size = (3.4 * len(systems), 2.5 * len(measures))
        figure, axes = plt.subplots(len(measures), len(systems), figsize=size, sharex=True, sharey="row", squeeze=False)
        for line, measure in zip(axes, measures, strict=True):
            for axis, system in zip(line, systems, strict=True):
                panel = data[(data["measure"] == measure) & (data["system"] == system)]
                for (length, label), rows in panel.groupby(["length", "label"], sort=False):
                    rows = rows.sort_values("token")
                    shown = f"{length} prefilled tokens" if label == "harmful" else ""
                    _line(axis, rows["token"], rows, lengths.index(length), DASHES[str(label)], shown)
                if measure == measures[0]:
                    axis.set_title(f"{system} (n ≤ {panel['n'].max()} replies)")
            line[0].set_ylabel(_broken(measure), fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("token of the reply")
        return titled(figure, title, f"{caption} {BANDS}", legend_of=axes[0][0])


def plot_divergence(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """KL from the pretrained model by token of the complying answer: a column a system; below, the difference.

    Args:
        data: of `tables.divergence_data`.
        title: the claim.
        caption: what stands behind it.
    """
    systems = list(dict.fromkeys(data["system"]))
    with style():
        size = (4.2 * len(systems), 5.2)
        figure, axes = plt.subplots(2, len(systems), figsize=size, sharex=True, sharey="row", squeeze=False)
        for column, system in enumerate(systems):
            above, below = axes[0][column], axes[1][column]
            for label, rows in data[data["system"] == system].groupby("label", sort=False):
                axis, number = (below, 2) if label == DIFFERENCE else (above, list(DASHES).index(str(label)))
                _line(axis, rows["position"] + 1, rows, number, DASHES[str(label)], str(label))
            above.set_title(f"{system} (n = {data[data['system'] == system]['n'].min()})")
            below.set(xlabel="token of the complying answer")
            below.axhline(0, color="grey", linewidth=0.8)
        axes[0][0].set_ylabel("KL from pretrained, nats")
        axes[1][0].set_ylabel("harmful minus benign, nats")
        how = "Bands: 95 % intervals over topics and wordings."
        return titled(figure, title, f"{caption} {how}", legend_of=[axes[0][0], axes[1][0]])


def plot_depth(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Change of the next word by exchanged states of the opening, by depth: a panel a system.

    Args:
        data: of `probes.prefill.depth.depth_changes`.
        title: the claim.
        caption: what stands behind it.
    """
    systems, sites = list(dict.fromkeys(data["system"])), list(dict.fromkeys(data["site"]))
    spans = list(dict.fromkeys(data["span"]))
    with style():
        figure, axes = plt.subplots(1, len(systems), figsize=(3.6 * len(systems), 3.3), sharey=True, squeeze=False)
        for axis, system in zip(axes[0], systems, strict=True):
            panel = data[data["system"] == system]
            for (span, label), rows in panel.groupby(["span", "label"], sort=False):
                rows = rows.set_index("site").reindex(sites)
                shown = str(span) if label == "harmful" else ""
                _line(axis, np.arange(len(sites)), rows, spans.index(str(span)), DASHES[str(label)], shown)
            axis.axhline(0, color="grey", linewidth=0.8)
            axis.set(xlabel="residual stream after block")
            _depths(axis, sites)
            gaps = panel.groupby("label", sort=False)["gap"].first()
            in_all = ", ".join(f"{label} {gap:.1f}" for label, gap in gaps.items())
            axis.set_title(f"{system}\n{in_all} nats in all, n = {int(panel['n'].min())}", fontsize=9)
        axes[0][0].set_ylabel("change of the next word, nats")
        return titled(figure, title, f"{caption} {BANDS}", legend_of=axes[0][0])


def plot_edges(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Change of a refusal when edges of attention are cut, beside random edges: a row a measure, a column a length.

    Args:
        data: of `tables.edge_data`.
        title: the claim.
        caption: what stands behind it.
    """
    data = data[data["label"] != DIFFERENCE]
    measures, lengths = list(dict.fromkeys(data["measure"])), sorted(data["length"].unique())
    edges = list(dict.fromkeys(data["edges"]))
    kinds = [("harmful", THESE), ("harmful", RANDOM), ("benign", THESE), ("benign", RANDOM)]
    with style():
        size = (4.6 * len(lengths) + 1, 2.4 * len(measures))
        figure, axes = plt.subplots(len(measures), len(lengths), figsize=size, sharey=True, squeeze=False)
        for line, measure in zip(axes, measures, strict=True):
            for axis, length in zip(line, lengths, strict=True):
                panel = data[(data["measure"] == measure) & (data["length"] == length)]
                for number, (label, cut) in enumerate(kinds):
                    rows = panel[(panel["label"] == label) & (panel["cut"] == cut)].set_index("edges").loc[edges]
                    place = np.arange(len(edges)) + (number - 1.5) * 0.16
                    axis.errorbar(
                        rows["value"], place, xerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
                        fmt="o" if cut == THESE else "x", color=LABEL_COLOURS[label], label=f"{label}, {cut}",
                        alpha=1.0 if cut == THESE else 0.6, markersize=5, capsize=2,
                    )  # fmt: skip
                axis.axvline(0, color="grey", linewidth=0.8)
                counts = ", ".join(f"{count:.0f}" for count in panel.groupby("edges")["count"].first()[edges])
                axis.set_yticks(np.arange(len(edges)), edges)
                axis.set(xlabel=f"change of {measure}")
                axis.set_title(f"{length} prefilled tokens ({counts} edges, n = {panel['n'].min()})", fontsize=9)
        axes[0][0].invert_yaxis()
        how = (
            "Crosses: as many random edges of each reader, mean of several draws. Bars: 95 % intervals over topics and "
            "wordings."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def plot_states(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Change of a refusal's log-odds by exchanged states, by depth: a panel an exchange, a line a label.

    Args:
        data: of `tables.state_data`.
        title: the claim.
        caption: what stands behind it.
    """
    exchanges, sites = list(dict.fromkeys(data["exchange"])), list(dict.fromkeys(data["site"]))
    with style():
        size = (3.6 * len(exchanges), 3.3)
        figure, axes = plt.subplots(1, len(exchanges), figsize=size, sharey=True, squeeze=False)
        for axis, exchange in zip(axes[0], exchanges, strict=True):
            for number, (label, rows) in enumerate(data[data["exchange"] == exchange].groupby("label", sort=False)):
                rows = rows.set_index("site").reindex(sites)
                _line(axis, np.arange(len(sites)), rows, number, DASHES[str(label)], str(label))
                axis.axhline(rows["gap"].iloc[0], color=SERIES[number], linewidth=0.8, linestyle=":")
            axis.axhline(0, color="grey", linewidth=0.8)
            axis.set(xlabel="residual stream after block", title=f"{exchange}\n(n = {int(data['n'].min())})")
            axis.title.set_fontsize(9)
            _depths(axis, sites)
        axes[0][0].set_ylabel("change of the log-odds of a refusal")
        how = "Dotted: the donor's run. Bands: 95 % intervals over topics and wordings."
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def _line(axis: Axes, x: pd.Series | np.ndarray, rows: pd.DataFrame, number: int, dash: str, name: str) -> None:
    colour = SERIES[number % len(SERIES)]
    marker = MARKERS[number % 6]
    axis.plot(x, rows["value"], dash, color=colour, marker=marker, markersize=4, label=name or "_nolegend_")
    axis.fill_between(np.asarray(x, dtype=float), rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)


def _depths(axis: Axes, sites: Sequence[str]) -> None:
    axis.set_xticks(np.arange(len(sites)), ["input" if site == "embeddings" else site for site in sites])


def _broken(measure: str) -> str:
    """A measure's name on two lines."""
    return measure.replace(", ", ",\n").replace(" of ", "\nof ", 1)
