"""Figures of the benchmarks: attacks with their benign counterparts, and judges against each other."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.figures import MARKERS, SERIES, error_bars, named_rows, not_refused_bars, style, titled

_COLUMNS = {
    "attack_success": "attack success, %",
    "over_refusal": "over-refusal, %",
    "benign_answered": "benign counterparts answered, %",
    "gate_auroc": "gate AUROC × 100",
}
_OUTCOMES = ("complied", "refused", "wrong_topic", "incoherent", "undecided")


def plot_attacks(data: pd.DataFrame, unread: Sequence[str], title: str, caption: str = "") -> Figure:
    """Every attack before and after CASA: success, over-refusal, benign counterparts answered, and AUROC of v_s.

    Args:
        data: the result schema, with the metrics `attack_success, over_refusal, benign_answered, gate_auroc`.
        unread: attacks that the model cannot read; they stand below the others on grey.
        title: the claim.
        caption: what stands behind it.
    """
    attacks = [name for name in dict.fromkeys(data["attack"]) if name not in unread]
    known = len(attacks)
    attacks += list(unread)
    with style():
        figure, axes = plt.subplots(1, 4, figsize=(12.5, 1.5 + 0.27 * len(attacks)), sharey=True)
        for axis, (metric, name) in zip(axes, _COLUMNS.items(), strict=True):
            panel = data[data["metric"] == metric]
            for number, defense in enumerate(dict.fromkeys(data["defense"])):
                rows = panel[panel["defense"] == defense].set_index("attack").reindex(attacks)
                y = np.arange(len(rows)) + 0.16 * (2 * number - 1)
                error_bars(axis, rows, y, SERIES[number], MARKERS[number], defense)
                not_refused_bars(axis, rows, y, SERIES[number], MARKERS[number])
            sizes = sorted(set(panel["n"]))
            axis.set(xlim=(-3, 103), xlabel=name, title=f"n = {sizes[0]}–{sizes[-1]} a point" if sizes else "")
            if unread:
                axis.axhspan(known - 0.5, len(attacks) - 0.5, color="grey", alpha=0.15, linewidth=0)
        axes[3].axvline(50, color="grey", linewidth=0.8)
        named_rows(axes[0], attacks)
        if unread:
            axes[0].text(99, len(attacks) - 0.6, "grey: cannot read it", ha="right", va="bottom", fontsize=8)
        how = (
            "Hollow: not refused, answered or not. Bars: 95 % intervals, over topics. The texts of FigStep and AIAH "
            "are our own wording."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes[0])


def plot_reading(data: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Shares of outcomes of harmful requests and of their benign counterparts under each attack.

    Args:
        data: columns `attack, label, outcome, n, share`, before CASA.
        title: the claim.
        caption: what stands behind it.
    """
    attacks = list(dict.fromkeys(data["attack"]))
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 1.5 + 0.24 * len(attacks)), sharey=True)
        for axis, label in zip(axes, ("harmful", "benign"), strict=True):
            left = np.zeros(len(attacks))
            for number, outcome in enumerate(_OUTCOMES):
                rows = data[(data["label"] == label) & (data["outcome"] == outcome)].set_index("attack")
                width = 100 * rows["share"].reindex(attacks).fillna(0).to_numpy()
                if width.any():
                    name = outcome.replace("_", " ")
                    axis.barh(np.arange(len(attacks)), width, left=left, color=SERIES[number], height=0.8, label=name)
                left += width
            sizes = data[data["label"] == label].groupby("attack")["n"].first()
            axis.set(xlim=(0, 100), xlabel="% of replies before CASA")
            axis.set_title(f"{label} (n = {sizes.min()}–{sizes.max()} an attack)")
        named_rows(axes[0], attacks)
        return titled(figure, title, caption, legend_of=axes)


def plot_judges(counts: pd.DataFrame, confusion: pd.DataFrame, reference: str, title: str, caption: str = "") -> Figure:
    """Success that another judge counts beyond the reference, by attack, and the confusion of their verdicts.

    Args:
        counts: columns `judge, defense, attack, n, excess, low, high` of one judge, a row an attack.
        confusion: columns `reference, judged, n, share` of the same judge.
        reference: the judge that it is held against.
        title: the claim.
        caption: what stands behind it.
    """
    attacks, judge = list(dict.fromkeys(counts["attack"])), counts["judge"].iloc[0]
    with style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, 1.5 + 0.27 * len(attacks)), gridspec_kw={"width_ratios": (3, 2)}
        )
        for number, defense in enumerate(dict.fromkeys(counts["defense"])):
            rows = counts[counts["defense"] == defense].set_index("attack").reindex(attacks)
            rows = rows.assign(value=rows["excess"])
            error_bars(
                left, rows, np.arange(len(rows)) + 0.16 * (2 * number - 1), SERIES[number], MARKERS[number], defense
            )
        left.axvline(0, color="grey", linewidth=0.8)
        named_rows(left, attacks)
        sizes = counts["n"]
        left.set(
            xlabel=f"success counted by {judge} beyond {reference}, points",
            title=f"n = {sizes.min()}–{sizes.max()} a cell",
        )
        _confusion(right, confusion, str(judge), reference)
        how = "Left: bars are 95 % intervals over topics. Right: replies by both verdicts."
        return titled(figure, title, f"{caption} {how}", legend_of=left)


def _confusion(axis: Axes, confusion: pd.DataFrame, judge: str, reference: str) -> None:
    table = confusion.pivot_table(index="reference", columns="judged", values="n", aggfunc="sum", fill_value=0)
    shares = table.div(table.sum(axis=1), axis=0).to_numpy()
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=1.4, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        text = f"{int(table.iloc[row, column])}\n{100 * share:.0f} %"
        axis.text(column, row, text, ha="center", va="center", fontsize=9)
    axis.set_xticks(np.arange(len(table.columns)), table.columns)
    axis.set_yticks(np.arange(len(table.index)), table.index)
    axis.grid(visible=False)
    axis.set(xlabel=f"{judge} judge", ylabel=f"{reference} judge", title="replies, % of the row")
