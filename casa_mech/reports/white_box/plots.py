"""Figures of white-box attacks: success against budget and steps, and with and without the refusal direction."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, bar_lengths, style, titled


def plot_rates_along(data: pd.DataFrame, units: Mapping[str, str], title: str, caption: str = "") -> Figure:
    """Rates along a budget, steps or starts, as lower bounds: a column a medium, a row a measure, a line an attacker.

    Args:
        data: columns `medium, attacker, measure, x, n, value, low, high`.
        units: for each medium, in the order of the columns, what `x` counts.
        title: the claim.
        caption: what stands behind it.
    """
    measures, attackers = list(dict.fromkeys(data["measure"])), list(dict.fromkeys(data["attacker"]))
    units = {medium: unit for medium, unit in units.items() if (data["medium"] == medium).any()}
    with style():
        size = (max(7.6, 3.3 * len(units)), 2.5 * len(measures) + 0.4)
        figure, axes = plt.subplots(len(measures), len(units), figsize=size, sharex="col", sharey=True, squeeze=False)
        for line, measure in zip(axes, measures, strict=True):
            for axis, medium in zip(line, units, strict=True):
                panel = data[(data["medium"] == medium) & (data["measure"] == measure)]
                places = sorted(panel["x"].unique())
                for number, attacker in enumerate(attackers):
                    rows = panel[panel["attacker"] == attacker].set_index("x").reindex(places)
                    x = np.arange(len(places)) + 0.06 * (number - (len(attackers) - 1) / 2)
                    error = 100 * bar_lengths(rows)
                    axis.errorbar(
                        x, 100 * rows["value"], yerr=error, marker=MARKERS[number], color=SERIES[number], capsize=2,
                        markersize=4.5, linestyle="-" if number == 0 else "--", label=f"attacker {attacker}",
                    )  # fmt: skip
                axis.set_xticks(np.arange(len(places)), places)
            line[0].set(ylabel=f"{measure}, % (at least)", ylim=(-4, 104))
        for axis, medium in zip(axes[0], units, strict=True):
            axis.set_title(f"{medium} (n = {int(data[data['medium'] == medium]['n'].min())})")
        for axis, unit in zip(axes[-1], units.values(), strict=True):
            axis.set_xlabel(unit)
        words = "Lower bounds on the worst case. Bars: 95 % intervals over topics."
        return titled(figure, title, f"{caption} {words}", legend_of=axes[0][0])


def plot_ablation(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Rates of the intact and the ablated model, surface by surface: a panel a system and measure.

    Args:
        data: columns `surface, system, measure, moment, n, value, low, high`.
        title: the claim.
        caption: what stands behind it.
    """
    panels = list(dict.fromkeys(zip(data["system"], data["measure"], strict=True)))
    surfaces, moments = list(dict.fromkeys(data["surface"])), list(dict.fromkeys(data["moment"]))
    with style():
        figure, axes = plt.subplots(1, len(panels), figsize=(3.3 * len(panels), 3.2), sharey=True, squeeze=False)
        for axis, (system, measure) in zip(axes[0], panels, strict=True):
            panel = data[(data["system"] == system) & (data["measure"] == measure)]
            for number, moment in enumerate(moments):
                rows = panel[panel["moment"] == moment].set_index("surface").reindex(surfaces)
                error = 100 * bar_lengths(rows)
                axis.bar(
                    np.arange(len(surfaces)) + 0.36 * (number - 0.5), 100 * rows["value"], 0.34, yerr=error, capsize=2,
                    color=SERIES[number], hatch="//" if number else "", label=f"{moment} (n = {int(rows['n'].min())})",
                )  # fmt: skip
            axis.set_xticks(np.arange(len(surfaces)), surfaces)
            axis.set(title=f"{system}: {measure}", ylim=(0, 104))
        axes[0][0].set_ylabel("harmful requests, %")
        return titled(figure, title, f"{caption} Bars: 95 % intervals over topics.", legend_of=axes[0][0])
