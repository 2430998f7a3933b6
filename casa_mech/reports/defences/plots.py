"""Figures of the comparison: defence × attack, safety against utility against cost, ablations, published rates."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.compare.tables import failed_trainings
from casa_mech.figures import BENIGN, HARMFUL, MARKERS, SERIES, style, titled
from casa_mech.judging.estimate import Estimate

PANELS = {"attack_success": "attack success (%)", "benign_answered": "benign counterparts answered (%)"}
_WIDE = 8
_ON_CALIBRATION = {"attack_success": "attack success", "benign_answered": "benign requests answered"}
METRIC_MARKS = {"attack_success": (HARMFUL, "^"), "benign_answered": (BENIGN, "o")}


def plot_grid(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """A heat-map for each of `PANELS` in `data`: a row a defence, a column an attack, in each cell rate and interval.

    Args:
        data: columns `defense, metric, scope, n, value, low, high`; fractions.
        title: the claim.
        caption: what stands behind it.
    """
    rows, columns = list(dict.fromkeys(data["defense"])), list(dict.fromkeys(data["scope"]))
    panels = {metric: name for metric, name in PANELS.items() if metric in set(data["metric"])}
    with style():
        # Many attacks: one panel below the other, or the page is too wide to read.
        down, across = (len(panels), 1) if len(columns) > _WIDE else (1, len(panels))
        size = (1.5 + across * max(3.2, 0.95 * len(columns)), 1.6 + down * 0.56 * len(rows))
        figure, axes = plt.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axis, (metric, name) in zip(axes.flat, panels.items(), strict=True):
            panel = data[data["metric"] == metric].set_index(["defense", "scope"])
            values = np.array([[panel["value"].get((row, column), np.nan) for column in columns] for row in rows])
            axis.imshow(100 * values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
            for y, row in enumerate(rows):
                for x, column in enumerate(columns):
                    if (row, column) in panel.index:
                        _cell(axis, x, y, panel.loc[(row, column)])
            axis.set_xticks(np.arange(len(columns)), columns, rotation=35, ha="right")
            axis.set_yticks(np.arange(len(rows)), rows)
            axis.grid(visible=False)
            each = panel.drop(index="all", level="scope")["n"]
            axis.set_title(f"{name}\nn = {int(each.min())} a cell{_seeds(data)}")
        how = "Cells: percent [95 % interval]; all: mean over the attacks."
        return titled(figure, title, f"{caption} {how}")


def plot_tradeoff(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Attack success against benign counterparts answered, a point a defence, its area the seconds a query takes.

    Args:
        data: columns `defense, n, attack_success, benign_answered` (each with `_low` and `_high`), `relative_seconds`
            (NaN for the model itself, which is 1), `not_refused`, `trained` (how many numbers its training sets),
            `seeds`, `failed` (share of them whose training missed its own criterion, or NaN).
        title: the claim.
        caption: what stands behind it.
    """
    with style():
        figure, axis = plt.subplots(figsize=(8.2, 4.8))
        for number, row in enumerate(data.to_dict("records")):
            x, y = 100 * row["attack_success"], 100 * row["benign_answered"]
            error = {
                "xerr": [[x - 100 * row["attack_success_low"]], [100 * row["attack_success_high"] - x]],
                "yerr": [[y - 100 * row["benign_answered_low"]], [100 * row["benign_answered_high"] - y]],
            }
            times = 1.0 if np.isnan(row["relative_seconds"]) else row["relative_seconds"]
            colour, marker = SERIES[number % len(SERIES)], MARKERS[(number // len(SERIES) + number) % len(MARKERS)]
            axis.errorbar(x, y, **error, color=colour, alpha=0.5, linewidth=0.9, capsize=2)
            trained = f", {row['trained'] / 1e3:.0f}k trained" if row["trained"] else ""
            if row.get("failed", 0) > 0:
                trained += f", {failed_trainings(row['failed'], row['seeds'])} trainings failed"
            axis.scatter(
                x, y, s=45 * times, color=colour, marker=marker, alpha=0.85, edgecolors="black", linewidths=0.5,
                label=f"{row['defense']}: {100 * row['not_refused']:.0f} % not refused, {times:.2f}× time{trained}",
            )  # fmt: skip
        axis.set(
            xlabel="attack success, mean over attacks (%)",
            ylabel="benign counterparts answered,\nmean over attacks (%)",
        )
        axis.set_title(f"n = {int(data['n'].min())} replies a rate{_seeds(data)}; area: seconds a query")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, markerscale=0.8)
        how = "Bars: 95 % intervals. Best is the upper left: no attack succeeds, every benign request is answered."
        return titled(figure, title, f"{caption} {how}")


def plot_alpha(curves: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Attack success and benign requests answered by CoCA's alpha on calibration requests, a panel a row of CoCA.

    Args:
        curves: columns `defense, alpha, metric, n, value, low, high, chosen`; fractions.
        title: the alpha that is chosen.
        caption: how.
    """
    names = list(dict.fromkeys(curves["defense"]))
    with style():
        size = (1.2 + 4.4 * len(names), 3.4)
        figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
        for axis, name in zip(axes.flat, names, strict=True):
            of_row = curves[curves["defense"] == name]
            for metric, (colour, marker) in METRIC_MARKS.items():
                points = of_row[of_row["metric"] == metric].sort_values("alpha")
                values, low, high = (100 * points[column] for column in ("value", "low", "high"))
                axis.errorbar(
                    points["alpha"], values, yerr=[values - low, high - values], color=colour, marker=marker,
                    capsize=2, label=_ON_CALIBRATION[metric],
                )  # fmt: skip
            chosen = float(of_row.loc[of_row["chosen"], "alpha"].iloc[0])
            axis.axvline(chosen, color="0.4", linestyle="--", linewidth=1, label="chosen")
            axis.set(xlabel=r"$\alpha$ (−1: no principle)", ylim=(-3, 103))
            axis.set_title(f"{name} (n = {int(of_row['n'].min())} a point)")
        axes[0][0].set_ylabel("calibration requests (%)")
        return titled(figure, title, f"{caption} Bars: 95 % intervals.", legend_of=axes[0][0])


def _cell(axis: Axes, x: int, y: int, row: pd.Series) -> None:
    percent = Estimate.of(row).times(100)
    share = row.get("not_refused", np.nan)
    beside = "" if np.isnan(share) else f"\nnot refused {100 * share:.0f}"
    axis.text(
        x, y, f"{percent.value:.0f}\n{percent.bounds('.0f')}{beside}", ha="center", va="center", fontsize=7,
        color="white" if percent.value < 55 else "black",
    )  # fmt: skip


def _seeds(data: pd.DataFrame) -> str:
    return f", {seeds} seeds" if (seeds := int(data["seeds"].max()) if "seeds" in data else 1) > 1 else ""
