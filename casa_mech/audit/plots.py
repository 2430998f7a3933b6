"""The audit in one figure: what becomes of requests behind a gate, and what the token alone does to refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.audit.audit import PATHS, SAFE, UNSAFE, WORD
from casa_mech.figures import BENIGN, HARMFUL, MARKERS, SERIES, error_bars, named_rows, style, titled

if TYPE_CHECKING:
    from casa_mech.audit.audit import AuditResult

_COLOURS = ("#D55E00", "#E69F00", "#F0E442", "#BBBBBB", "#56B4E9", "#0072B2")
_HATCHES = ("", "//", "..", "xx", "\\\\", "")
_TOKENS = {UNSAFE: HARMFUL, SAFE: BENIGN, WORD: SERIES[5]}


def plot_audit(result: AuditResult) -> Figure:
    """Left: shares of `PATHS` of harmful requests, by attack; middle: of benign ones; right: refusals by forced token.

    The right panel draws harmful requests filled and benign ones hollow, with 95 % intervals over clusters.
    """
    paths, effects = _named_cells(result.paths()), _named_cells(result.effects())
    attacks = list(dict.fromkeys(paths["attack"]))
    with style():
        size = (12, 1.9 + 0.42 * len(attacks))
        figure, (harmful, benign, forced) = plt.subplots(1, 3, figsize=size, sharey=True)
        _stack(harmful, paths[paths["label"] == "harmful"], attacks, "harmful")
        _stack(benign, paths[paths["label"] == "benign"], attacks, "benign")
        _forced(forced, effects[effects["outcome"] == "refused"], attacks)
        named_rows(harmful, attacks)
        figure = titled(figure, audit_title(result), legend_of=harmful)
        forced.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
        return figure


def audit_title(result: AuditResult) -> str:
    """The claim: how much of the fall of attack success the token caused, over all harmful requests alike."""
    split = result.split()
    harmful = split[split["label"] == "harmful"]
    if harmful.empty:
        return f"{result.defense} on {result.model}: benign requests behind the gate"
    counts = harmful["value"] * harmful["n"]
    means = counts.groupby(harmful["part"]).sum() / harmful.groupby("part")["n"].sum()
    return (
        f"{result.defense} on {result.model}: attack success falls by {100 * means['total']:.0f} points, of which "
        f"{100 * means['gate']:.0f} because the unsafe token makes the reply refuse"
    )


def _named_cells(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the surface in the attack's name where one attack is on several surfaces."""
    several = table.groupby("attack")["surface"].transform("nunique") > 1
    return table.assign(attack=table["attack"].where(~several, table["attack"] + ", " + table["surface"]))


def _stack(axis: Axes, paths: pd.DataFrame, attacks: Sequence[str], label: str) -> None:
    start = np.zeros(len(attacks))
    for (path, name), colour, hatch in zip(PATHS.items(), _COLOURS, _HATCHES, strict=True):
        share = 100 * paths[paths["path"] == path].set_index("attack").reindex(attacks)["value"].fillna(0).to_numpy()
        axis.barh(
            np.arange(len(attacks)), share, left=start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5,
            height=0.7, label=name,
        )  # fmt: skip
        start = start + share
    n = int(paths["n"].min()) if len(paths) else 0
    axis.set(xlim=(0, 100), xlabel="percent of requests", title=f"{label} requests behind the gate (n ≥ {n})")
    axis.grid(axis="y", visible=False)


def _forced(axis: Axes, refused: pd.DataFrame, attacks: Sequence[str]) -> None:
    heights = np.arange(len(attacks))
    for number, (token, colour) in enumerate(_TOKENS.items()):
        for label, shift in (("harmful", -0.15), ("benign", 0.15)):
            rows = refused[(refused["intervention"] == token) & (refused["label"] == label)]
            rows = rows.set_index("attack").reindex(attacks)
            y = heights + shift + 0.09 * (number - 1)
            error_bars(axis, rows, y, colour, MARKERS[number], f"{token}, {label}")
            if label == "benign":
                axis.lines[-3].set_markerfacecolor("white") if len(axis.lines) >= 3 else None
    axis.set(xlim=(-3, 103), xlabel="refused, %", title="refused under a forced token")
