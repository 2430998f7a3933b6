"""Figures of notebook 03: attack success, and how well v_s and the token tell harm apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, bar_lengths, not_refused_bars, style, titled
from casa_mech.study.settings import slug


def plot_rates(data: pd.DataFrame, panels: Sequence[tuple[str, str]], title: str, caption: str = "") -> Figure:
    """Rates with Wilson intervals: a row of panels a model, a column a metric, an attack a line, defences side by side.

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
        how = "Hollow: not refused, answered or not. Bars: 95 % intervals (Wilson); n: requests in a cell."
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


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
