"""Figures of the numbers that CASA's authors published; nothing in them was measured here."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, error_bars, style, titled
from casa_mech.judging.published import NOT_MEASURED

_RATES = "Attack success of other models on other benchmarks, counted by another judge; no intervals were published."
_INTERVALS = (
    "Attack success of other models on other benchmarks, counted by another judge. Bars: Wilson's 95 % intervals for "
    "the smallest test set that fits all published rates of a benchmark; none were published."
)


def plot_published(data: pd.DataFrame, title: str = NOT_MEASURED, caption: str = _RATES) -> Figure:
    """The paper's own numbers, one panel a model: a row a benchmark, a marker a defence.

    Args:
        data: columns `model, defense, attack, value` (a fraction).
        title: says that nothing here was measured.
        caption: where the numbers are from.
    """
    models = list(dict.fromkeys(data["model"]))
    attacks, defenses = list(dict.fromkeys(data["attack"])), list(dict.fromkeys(data["defense"]))
    with style():
        figure, axes = plt.subplots(1, len(models), figsize=(4.4 * len(models), 3.2), sharey=True, squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            panel = data[data["model"] == model]
            for number, defense in enumerate(defenses):
                rows = panel[panel["defense"] == defense].set_index("attack").reindex(attacks)
                y = np.arange(len(rows)) + 0.12 * (number - (len(defenses) - 1) / 2)
                axis.plot(100 * rows["value"], y, MARKERS[number % 6], color=SERIES[number % 6], label=defense)
            axis.set(xlim=(-3, 103), xlabel="attack success as published, %", title=model)
            axis.set_yticks(np.arange(len(attacks)), attacks)
        axes[0][0].invert_yaxis()
        return titled(figure, title, caption, legend_of=axes[0][0])


def plot_published_rates(data: pd.DataFrame, title: str = NOT_MEASURED, caption: str = _INTERVALS) -> Figure:
    """The paper's rates, a panel a model and table; intervals where a test-set size fits all rates of a benchmark.

    Args:
        data: columns `table, model, defense, attack, value, low, high`; fractions.
        title: says that nothing here was measured.
        caption: where the numbers are from.
    """
    panels = list(dict.fromkeys(zip(data["table"], data["model"], strict=True)))
    attacks = list(dict.fromkeys(data["attack"]))
    with style():
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), sharey=True, squeeze=False)
        for axis, (table, model) in zip(axes[0], panels, strict=True):
            panel = data[(data["table"] == table) & (data["model"] == model)]
            defenses = list(dict.fromkeys(panel["defense"]))
            for number, defense in enumerate(defenses):
                rows = panel[panel["defense"] == defense].set_index("attack").reindex(attacks)
                y = np.arange(len(attacks)) + 0.14 * (number - (len(defenses) - 1) / 2)
                error_bars(axis, rows, y, SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)], defense)
            axis.set(xlim=(-3, 103), xlabel="attack success as published (%)", title=f"{model}, {table} table")
            axis.set_yticks(np.arange(len(attacks)), attacks)
            axis.legend(loc="upper right", fontsize=8)  # the rates there are low
        axes[0][0].invert_yaxis()
        return titled(figure, title, caption)
