"""Figures of notebook 06: one setting changed at a time, and attention × safety prompt."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, error_bars, not_refused_bars, style, titled
from casa_mech.reports.defences.plots import METRIC_MARKS, PANELS


def plot_ablations(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Attack success and benign counterparts answered, a panel an axis, a row a level; the base's name is in capitals.

    Args:
        data: columns `axis, level, base, metric, n, value, low, high`, over all attacks; fractions.
        title: the claim.
        caption: what stands behind it.
    """
    axes_names = list(dict.fromkeys(data["axis"]))
    across = min(3, len(axes_names))
    down = -(-len(axes_names) // across)
    with style():
        figure, axes = plt.subplots(down, across, figsize=(4.1 * across, 2.3 * down), sharex=True, squeeze=False)
        for axis, name in zip(axes.flat, axes_names, strict=False):
            panel = data[data["axis"] == name]
            levels = panel.drop_duplicates("level")[["level", "base"]].to_records(index=False)
            _levels(axis, panel, [str(level) for level, _ in levels])
            shown = [str(level).upper() if base else str(level) for level, base in levels]
            axis.set_yticks(np.arange(len(levels)), shown)
            axis.set_ylim(len(levels) - 0.5, -0.5)
            axis.set_title(f"{name} (n = {int(panel['n'].min())})")
        for axis in axes.flat[len(axes_names) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("percent of requests")
        how = "Hollow: not refused. Bars: 95 % intervals. In capitals: the base, the same in every panel."
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def plot_by_attack(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Attack success and benign counterparts answered by attack, a marker a level, with intervals.

    Args:
        data: columns `level, metric, scope, n, value, low, high`; fractions.
        title: the claim.
        caption: what stands behind it.
    """
    levels, scopes = list(dict.fromkeys(data["level"])), list(dict.fromkeys(data["scope"]))
    with style():
        size = (9, 1.4 + 0.45 * len(scopes))
        figure, axes = plt.subplots(1, len(PANELS), figsize=size, sharey=True, sharex=True)
        for axis, (metric, name) in zip(axes, PANELS.items(), strict=True):
            panel = data[data["metric"] == metric]
            for number, level in enumerate(levels):
                rows = panel[panel["level"] == level].set_index("scope").reindex(scopes)
                y = np.arange(len(scopes)) + 0.17 * (number - (len(levels) - 1) / 2)
                look = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
                error_bars(axis, rows, y, *look, str(level))
                not_refused_bars(axis, rows, y, *look)
            axis.set(xlim=(-3, 103), xlabel=name)
            axis.set_title(f"n = {int(panel[panel['scope'] != 'all']['n'].min())} a cell")
            axis.set_yticks(np.arange(len(scopes)), scopes)
        axes[0].invert_yaxis()
        return titled(figure, title, f"{caption} Hollow: not refused. Bars: 95 % intervals.", legend_of=axes[0])


def _levels(axis: Axes, panel: pd.DataFrame, levels: list[str]) -> None:
    for shift, (metric, name) in zip((-0.13, 0.13), PANELS.items(), strict=True):
        rows = panel[panel["metric"] == metric].set_index("level").reindex(levels)
        colour, marker = METRIC_MARKS[metric]
        error_bars(axis, rows, np.arange(len(levels)) + shift, colour, marker, name.removesuffix(" (%)"))
        not_refused_bars(axis, rows, np.arange(len(levels)) + shift, colour, marker)
    axis.set_xlim(-3, 103)
