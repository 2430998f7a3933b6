"""Figures of notebook 03: attack success, and how well v_s and the token tell harm apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, bar_lengths, not_refused_bars, style, titled
from casa_mech.study.settings import slug

PATH_STYLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "complied": ("#BBBBBB", ""),
        "flagged, complied": ("#F0E442", ".."),
        "flagged, failed": ("#E69F00", "//"),
        "failed": ("#D55E00", "xx"),
        "refused": ("#56B4E9", "\\\\"),
        "flagged, refused": ("#0072B2", ""),
    }
)
"""Colour and hatch of each of `audit.result.PATHS`, as its parts have them in the figure of an audit."""


def plot_rates(data: pd.DataFrame, panels: Sequence[tuple[str, str]], title: str, caption: str = "") -> Figure:
    """Rates with their intervals: a row of panels a model, a column a metric, an attack a line, defences side by side.

    Args:
        data: the result schema (`model, defense, attack, metric, n, value, low, high`) and `merit.NOT_REFUSED`.
        panels: (metric, axis label), drawn in this order for each model.
        title: the claim.
        caption: what stands behind it.
    """
    models, defenses = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["defense"]))
    cells = [(model, metric, name) for model in models for metric, name in panels]
    attacks = {metric: list(dict.fromkeys(data[data["metric"] == metric]["attack"])) for metric, _ in panels}
    height = 1.2 + 0.36 * max(len(names) for names in attacks.values())
    with style():
        size = (3.1 * len(panels), 0.7 + height * len(models))
        figure, axes = plt.subplots(len(models), len(panels), figsize=size, sharex=True, squeeze=False)
        for axis, (model, metric, name) in zip(axes.flat, cells, strict=True):
            panel = data[(data["model"] == model) & (data["metric"] == metric)]
            for number, defense in enumerate(defenses):
                rows = panel[panel["defense"] == defense].set_index("attack").reindex(attacks[metric])
                y = np.arange(len(rows)) + 0.16 * (2 * number - len(defenses) + 1)
                error = 100 * bar_lengths(rows)
                axis.errorbar(
                    100 * rows["value"], y, xerr=error, fmt=MARKERS[number], color=SERIES[number], capsize=2,
                    markersize=4.5, label=defense,
                )  # fmt: skip
                not_refused_bars(axis, rows, y, SERIES[number], MARKERS[number])
            smallest = int(panel["n"].min()) if len(panel) else 0
            axis.set(xlim=(-3, 103), xlabel=f"{name}, %", title=f"{slug(model)} (n ≥ {smallest})")
            axis.tick_params(labelbottom=True)
            axis.set_yticks(np.arange(len(attacks[metric])), attacks[metric])
            axis.invert_yaxis()
        how = "Hollow: not refused, answered or not. Bars: 95 % intervals over topics and gates; n: replies in a cell."
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def plot_paths(data: pd.DataFrame, names: Mapping[str, str], title: str, caption: str = "") -> Figure:
    """What becomes of harmful requests, a stacked bar an attack and defence: a panel a model, an attack two bars.

    Args:
        data: columns `model, defense, attack, path, n, value`; the shares of a bar sum to 1.
        names: what to call each path, in the order of the bar.
        title: the claim.
        caption: what stands behind it.
    """
    models, attacks = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["attack"]))
    defenses = list(dict.fromkeys(data["defense"]))
    shares = data.set_index(["model", "defense", "attack", "path"])["value"].to_dict()
    with style():
        size = (6.4 * len(models), 1.6 + 0.5 * len(attacks))
        figure, axes = plt.subplots(1, len(models), figsize=size, sharex=True, sharey=True, squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            for number, defense in enumerate(defenses):
                places = np.arange(len(attacks)) + 0.4 * (number - (len(defenses) - 1) / 2)
                start = np.zeros(len(attacks))
                for path, name in names.items():
                    width = 100 * np.array([shares[model, defense, attack, path] for attack in attacks])
                    colour, hatch = PATH_STYLES[path]
                    axis.barh(
                        places, width, left=start, height=0.36, color=colour, hatch=hatch, edgecolor="white",
                        linewidth=0.5, label="" if number else name,
                    )  # fmt: skip
                    start = start + width
            smallest = int(data[data["model"] == model]["n"].min())
            axis.set(xlim=(0, 100), xlabel="percent of harmful requests", title=f"{slug(model)} (n ≥ {smallest})")
            axis.set_yticks(np.arange(len(attacks)), attacks)
            axis.grid(axis="y", visible=False)
        axes[0][0].invert_yaxis()
        return titled(
            figure, title, f"{caption} Upper bar: {defenses[0]}; lower: {defenses[-1]}.", legend_of=axes[0][0]
        )


def plot_separation(data: pd.DataFrame, scores: Mapping[str, str], gain: str, title: str, caption: str = "") -> Figure:
    """AUROC of several scores with their intervals, an attack a line; beside it what one adds to another.

    Two panels a model: left the scores side by side, right the difference.

    Args:
        data: the result schema (`model, attack, metric, n, value, low, high`).
        scores: what to call each metric.
        gain: the metric of the difference.
        title: the claim.
        caption: what stands behind it.
    """
    models, attacks = list(dict.fromkeys(data["model"])), list(dict.fromkeys(data["attack"]))
    with style():
        size = (6.6 * len(models), 1.6 + 0.4 * len(attacks))
        ratios = {"width_ratios": [1.5, 1] * len(models)}
        figure, axes = plt.subplots(1, 2 * len(models), figsize=size, sharey=True, squeeze=False, gridspec_kw=ratios)
        for axis, difference, model in zip(axes[0][::2], axes[0][1::2], models, strict=True):
            panel = data[data["model"] == model]
            for number, (metric, name) in enumerate(scores.items()):
                rows = panel[panel["metric"] == metric].set_index("attack").reindex(attacks)
                y = np.arange(len(rows)) + 0.12 * (2 * number - len(scores) + 1)
                axis.errorbar(
                    rows["value"], y, xerr=bar_lengths(rows), fmt=MARKERS[number], color=SERIES[number], capsize=2,
                    markersize=4.5, label=name,
                )  # fmt: skip
            axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set(xlabel="AUROC", title=f"{slug(model)} (n ≥ {int(panel['n'].min())} an attack)")
            axis.set_yticks(np.arange(len(attacks)), attacks)
            rows = panel[panel["metric"] == gain].set_index("attack").reindex(attacks)
            difference.errorbar(
                rows["value"], np.arange(len(rows)), xerr=bar_lengths(rows), fmt=MARKERS[len(scores)],
                color=SERIES[len(scores)], capsize=2, markersize=4.5,
            )  # fmt: skip
            difference.axvline(0, color="black", linewidth=0.8, linestyle=":")
            difference.set(xlabel="what attention adds to it", title="rewritten minus raw")
        axes[0][0].invert_yaxis()
        how = (
            "Bars: 95 % intervals by bootstrap over topics, the difference's on the same resamples; dotted: chance, "
            "and no difference."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])
