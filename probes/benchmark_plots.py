"""Figures of the benchmarks: attacks with their benign twins, judges against each other, and a gate on real English."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.plots import BENIGN, HARMFUL, MARKERS, SERIES, style, titled

_COLUMNS = {
    "attack_success": "attack success, %",
    "over_refusal": "over-refusal, %",
    "benign_answered": "benign twins answered, %",
    "gate_auroc": "gate AUROC × 100",
}
_ENGLISH = {
    "gate_auroc": (SERIES[5], MARKERS[0], "AUROC of v_s"),
    "token_auroc": (SERIES[2], MARKERS[1], "AUROC of the safety token's log-odds"),
    "words_auroc": (SERIES[1], MARKERS[3], "AUROC of words alone (logistic regression)"),
}
_OUTCOMES = ("complied", "refused", "wrong_topic", "incoherent", "undecided")


def plot_attacks(data: pd.DataFrame, unread: Sequence[str], title: str) -> Figure:
    """Every attack before and after CASA with 95 % intervals: success, over-refusal, twins answered, and AUROC of v_s.

    Args:
        data: the result schema, with the metrics `attack_success, over_refusal, benign_answered, gate_auroc`.
        unread: attacks that the model cannot read; they stand below the others on grey.
        title: the claim.
    """
    attacks = [name for name in dict.fromkeys(data["attack"]) if name not in unread]
    known = len(attacks)
    attacks += list(unread)
    with style():
        figure, axes = plt.subplots(1, 4, figsize=(12.5, 1.5 + 0.27 * len(attacks)), sharey=True)
        for axis, (metric, name) in zip(axes, _COLUMNS.items(), strict=True):
            part = data[data["metric"] == metric]
            for number, defense in enumerate(dict.fromkeys(data["defense"])):
                rows = part[part["defense"] == defense].set_index("attack").reindex(attacks)
                _points(axis, rows, 0.16 * (2 * number - 1), SERIES[number], MARKERS[number], defense)
            sizes = sorted(set(part["n"]))
            axis.set(xlim=(-3, 103), xlabel=name, title=f"n = {sizes[0]}–{sizes[-1]} a point" if sizes else "")
            if unread:
                axis.axhspan(known - 0.5, len(attacks) - 0.5, color="grey", alpha=0.15, linewidth=0)
        axes[3].axvline(50, color="grey", linewidth=0.8)
        _names(axes[0], attacks)
        if unread:
            axes[0].text(99, len(attacks) - 0.6, "grey: cannot read it", ha="right", va="bottom", fontsize=8)
        return titled(figure, title, axes[0])


def plot_reading(data: pd.DataFrame, title: str) -> Figure:
    """What becomes of harmful requests and of their benign twins under each attack, as shares of outcomes.

    Args:
        data: columns `attack, label, outcome, n, share`, before CASA.
        title: the claim.
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
        _names(axes[0], attacks)
        return titled(figure, title, axes[0] if len(axes[0].patches) >= len(axes[1].patches) else axes[1])


def plot_judges(counts: pd.DataFrame, confusion: pd.DataFrame, reference: str, title: str) -> Figure:
    """What another judge counts as success beyond the reference, by attack, and the confusion of their verdicts.

    Args:
        counts: columns `judge, defense, attack, n, excess, low, high` of one judge, a row an attack.
        confusion: columns `reference, judged, n, share` of the same judge.
        reference: the judge that it is held against.
        title: the claim.
    """
    attacks, judge = list(dict.fromkeys(counts["attack"])), counts["judge"].iloc[0]
    with style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, 1.5 + 0.27 * len(attacks)), gridspec_kw={"width_ratios": (3, 2)}
        )
        for number, defense in enumerate(dict.fromkeys(counts["defense"])):
            rows = counts[counts["defense"] == defense].set_index("attack").reindex(attacks)
            rows = rows.assign(value=rows["excess"])
            _points(left, rows, 0.16 * (2 * number - 1), SERIES[number], MARKERS[number], defense)
        left.axvline(0, color="grey", linewidth=0.8)
        _names(left, attacks)
        sizes = counts["n"]
        left.set(
            xlabel=f"success counted by {judge} beyond {reference}, points",
            title=f"n = {sizes.min()}–{sizes.max()} a cell",
        )
        _confusion(right, confusion, str(judge), reference)
        return titled(figure, title, left)


def plot_english(data: pd.DataFrame, title: str) -> Figure:
    """A gate on real prompts: AUROC of v_s and of the token, and how many prompts it flags, with 95 % intervals.

    Args:
        data: the result schema, with the metrics `gate_auroc`, `token_auroc`, `flagged` and `words_auroc` (of words
            alone).
        title: the claim.
    """
    data = data.assign(panel=data["attack"] + ", " + data["surface"])
    panels = list(dict.fromkeys(data["panel"]))
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 1.4 + 0.4 * len(panels)), sharey=True)
        rows = data[data["metric"] == "gate_auroc"].set_index("panel").reindex(panels)
        for shift, (metric, (colour, marker, name)) in zip((-0.2, 0.0, 0.2), _ENGLISH.items(), strict=True):
            part = data[data["metric"] == metric].set_index("panel").reindex(panels)
            _points(left, part, shift, colour, marker, name, scale=1)
        left.axvline(0.5, color="grey", linewidth=0.8)
        left.set(xlabel="AUROC", title=f"n = {rows['n'].min():.0f}–{rows['n'].max():.0f} a row", xlim=(-0.02, 1.02))
        for shift, label, colour, marker in ((-0.12, "harmful", HARMFUL, "^"), (0.12, "benign", BENIGN, "o")):
            part = data[(data["metric"] == "flagged") & (data["label"] == label)].set_index("panel").reindex(panels)
            _points(right, part, shift, colour, marker, label)
        right.set(xlabel="given the unsafe token, %", xlim=(-3, 103))
        _names(left, panels)
        # The figure's one legend is the right panel's; what is on the left is named there.
        for colour, marker, name in _ENGLISH.values():
            right.plot([], [], marker, color=colour, markersize=4, label=name)
        return titled(figure, title, right)


def _names(axis: Axes, names: Sequence[str]) -> None:
    """`names` down the vertical axis, the first on top."""
    axis.set_yticks(np.arange(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _points(
    axis: Axes, rows: pd.DataFrame, shift: float, colour: str, marker: str, name: str, scale: float = 100
) -> None:
    error = scale * np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
    axis.errorbar(
        scale * rows["value"], np.arange(len(rows)) + shift, xerr=error, fmt=marker, color=colour, capsize=2,
        markersize=4, label=name,
    )  # fmt: skip


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
