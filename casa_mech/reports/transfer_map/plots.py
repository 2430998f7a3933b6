"""Figures of notebook 11: the map of transfer, its predictors, the causes of a fall, and what mends it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, bar_lengths, error_bars, named_rows, style, titled
from casa_mech.organism.premise_rows import SURFACES
from casa_mech.reports.transfer_map.tables import AWAY, CAUSES, OUTCOMES, PREDICTORS, SHOWN

_CAUSE_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#BBBBBB", "#000000")
_HATCHES = ("", "\\\\", "//", "xx", "..", "")


def plot_transfer(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """The measures of `tables.SHOWN` by member and surface: a panel a measure, a member a line.

    Args:
        data: `tables.transfer_data`.
        title: the claim.
        caption: what stands behind it.
    """
    members = list(dict.fromkeys(data["member"]))
    with style():
        size = (3.6 * len(SHOWN), 1.6 + 0.34 * len(members))
        figure, axes = plt.subplots(1, len(SHOWN), figsize=size, sharey=True)
        for axis, (measure, name) in zip(axes, SHOWN.items(), strict=True):
            panel = data[data["measure"] == measure]
            for number, surface in enumerate(SURFACES):
                rows = panel[panel["surface"] == surface].set_index("member").reindex(members)
                y = np.arange(len(members)) + 0.14 * (number - (len(SURFACES) - 1) / 2)
                error_bars(axis, rows, y, SERIES[number], MARKERS[number], surface, scale=1)
            axis.axvline(0 if measure == "forced" else 0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set_xlabel(name)
        named_rows(axes[0], members)
        how = (
            "Points: mean over a member's gates; bars: the least and the largest of them; dotted: chance, or no effect."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0])


def plot_prediction(points: pd.DataFrame, correlations: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Each predictor against each outcome: a column a predictor, a row an outcome, a point a member and surface.

    Args:
        points: `tables.prediction_points`.
        correlations: `tables.prediction_data`, whose correlations stand above the panels.
        title: the claim.
        caption: what stands behind it.
    """
    known = correlations.set_index(["predictor", "outcome"])
    with style():
        size = (2.5 * len(PREDICTORS), 2.7 * len(OUTCOMES))
        figure, axes = plt.subplots(len(OUTCOMES), len(PREDICTORS), figsize=size, sharey="row", sharex="col")
        for line, (outcome, outcome_name) in zip(axes, OUTCOMES.items(), strict=True):
            for axis, (predictor, predictor_name) in zip(line, PREDICTORS.items(), strict=True):
                for number, surface in enumerate(AWAY):
                    rows = points[points["surface"] == surface]
                    axis.scatter(
                        rows[predictor],
                        rows[outcome],
                        color=SERIES[number],
                        marker=MARKERS[number],
                        s=18,
                        label=surface,
                    )
                if (predictor, outcome) in known.index:
                    row = known.loc[(predictor, outcome)]
                    axis.set_title(
                        f"ρ = {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]\np = {row['p_holm']:.3f}",
                        fontsize=8,
                    )
                if outcome == list(OUTCOMES)[-1]:
                    axis.set_xlabel(predictor_name, fontsize=8)
            line[0].set_ylabel(outcome_name, fontsize=9)
        how = (
            "ρ: rank correlation with its 95 % interval by bootstrap over organisms; p: permutation of whole "
            "organisms, after Holm's correction over all panels."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0][0])


def plot_causes(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """The parts of the fall of attack success on pictures and speech, a member a line.

    Args:
        data: `tables.cause_data`.
        title: the claim.
        caption: what stands behind it.
    """
    members = list(dict.fromkeys(data["member"]))
    with style():
        figure, axis = plt.subplots(figsize=(8, 1.4 + 0.34 * len(members)))
        right, left = np.zeros(len(members)), np.zeros(len(members))
        for part, colour, hatch in zip(CAUSES, _CAUSE_COLOURS, _HATCHES, strict=True):
            width = 100 * data[data["part"] == part].set_index("member").reindex(members)["value"].fillna(0).to_numpy()
            start = np.where(width >= 0, right, left)
            axis.barh(
                np.arange(len(members)), width, left=start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5,
                height=0.7, label=part,
            )  # fmt: skip
            right, left = right + np.clip(width, 0, None), left + np.clip(width, None, 0)
        total = data[data["part"] == "total"].set_index("member").reindex(members)
        y = np.arange(len(members))
        axis.errorbar(
            100 * total["value"], y, xerr=100 * bar_lengths(total), fmt="D", color="black", capsize=2, markersize=4,
            label="whole fall",
        )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("fall of attack success on pictures and speech, points")
        axis.grid(axis="y", visible=False)
        named_rows(axis, members)
        how = "Bars: mean over a member's gates, pictures and speech; whiskers: the least and the largest gate."
        return titled(figure, title, f"{caption} {how}", legend_of=axis)


def plot_mends(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Each way to mend a gate: how far attack success falls on pictures and speech, and at what price.

    Args:
        data: `tables.mend_data`.
        title: the claim.
        caption: what stands behind it.
    """
    mends = list(data["mend"])
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 1.4 + 0.4 * len(mends)), sharey=True)
        names = {"fall": "fall of attack success, points", "price": "benign requests no longer answered, points"}
        for number, (axis, (side, name)) in enumerate(zip(axes, names.items(), strict=True)):
            rows = data[[side, f"{side}_low", f"{side}_high"]].set_axis(["value", "low", "high"], axis=1)
            error_bars(axis, rows, np.arange(len(mends)), SERIES[number], MARKERS[number], name)
            axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
            axis.set_xlabel(name)
        named_rows(axes[0], mends)
        how = "Means over organisms and gates, pictures and speech; bars: 95 % intervals by bootstrap over organisms."
        return titled(figure, title, f"{caption} {how}")
