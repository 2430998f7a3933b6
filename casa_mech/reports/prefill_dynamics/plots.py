"""Figures of what a prefill does: by its length, by generated token, and by depth."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, style, titled

DASHES = ("-", "--", ":")


def plot_lengths(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Every measure by the prefill's length, with intervals: a panel a measure, a line a system.

    Args:
        data: columns `measure, system, length, value, low, high, n`.
        title: the claim.
        caption: what stands behind it.
    """
    measures = list(dict.fromkeys(data["measure"]))
    names = list(dict.fromkeys(data["system"]))
    with style():
        rows = -(-len(measures) // 3)
        figure, axes = plt.subplots(rows, 3, figsize=(11, 3.1 * rows), squeeze=False)
        for axis, measure in zip(axes.flat, measures, strict=False):
            for name, panel in data[data["measure"] == measure].groupby("system", sort=False):
                number = names.index(str(name))
                _line(axis, panel["length"], panel, number, "-", str(name))
            axis.set(xlabel="prefilled tokens", title=f"{measure} (n = {data[data['measure'] == measure]['n'].min()})")
        for axis in axes.flat[len(measures) :]:
            axis.axis("off")
        return titled(figure, title, f"{caption} Bands: 95 % intervals.", legend_of=axes.ravel())


def plot_tokens(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Every measure by generated token: a row a measure, a column a system, a line a length of prefill.

    Args:
        data: columns `measure, system, length, token, value, low, high, n`.
        title: the claim.
        caption: what stands behind it.
    """
    measures, systems = list(dict.fromkeys(data["measure"])), list(dict.fromkeys(data["system"]))
    lengths = sorted(data["length"].unique())
    with style():
        size = (3.4 * len(systems), 2.5 * len(measures))
        figure, axes = plt.subplots(len(measures), len(systems), figsize=size, sharex=True, sharey="row", squeeze=False)
        for line, measure in zip(axes, measures, strict=True):
            for axis, system in zip(line, systems, strict=True):
                panel = data[(data["measure"] == measure) & (data["system"] == system)]
                for number, length in enumerate(lengths):
                    rows = panel[panel["length"] == length].sort_values("token")
                    _line(axis, rows["token"], rows, number, DASHES[number % 3], f"{length} prefilled tokens")
                if measure == measures[0]:
                    axis.set_title(f"{system} (n ≤ {panel['n'].max()} replies)")
            line[0].set_ylabel(measure.replace(", ", ",\n").replace(" of ", "\nof "), fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("token of the reply")
        return titled(figure, title, f"{caption} Bands: 95 % intervals.", legend_of=axes[0][0])


def plot_depth(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Share of the openings' difference that runs through some positions, by depth: a panel a system.

    Args:
        data: of `probes.prefill.depth.depth_shares`.
        title: the claim.
        caption: what stands behind it.
    """
    systems, sites = list(dict.fromkeys(data["system"])), list(dict.fromkeys(data["site"]))
    with style():
        figure, axes = plt.subplots(1, len(systems), figsize=(3.6 * len(systems), 3.3), sharey=True, squeeze=False)
        for axis, system in zip(axes[0], systems, strict=True):
            panel = data[data["system"] == system]
            for number, (span, rows) in enumerate(panel.groupby("span", sort=False)):
                rows = rows.rename(columns={"share": "value"}).set_index("site").reindex(sites)
                _line(axis, np.arange(len(sites)), rows, number, DASHES[number % 3], str(span))
            axis.axhline(0, color="grey", linewidth=0.8)
            axis.set_xticks(np.arange(len(sites)), ["input" if site == "embeddings" else site for site in sites])
            gap, n = panel["gap"].iloc[0], int(panel["n"].min())
            axis.set(xlabel="residual stream after block", title=f"{system}\n{gap:.1f} nats in all, n = {n}")
        axes[0][0].set_ylabel("share through these positions")
        return titled(figure, title, f"{caption} Bands: 95 % intervals.", legend_of=axes[0][0])


def _line(axis: Axes, x: pd.Series | np.ndarray, rows: pd.DataFrame, number: int, dash: str, name: str) -> None:
    colour = SERIES[number % len(SERIES)]
    axis.plot(x, rows["value"], dash, color=colour, marker=MARKERS[number % 6], markersize=4, label=name)
    axis.fill_between(np.asarray(x, dtype=float), rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
