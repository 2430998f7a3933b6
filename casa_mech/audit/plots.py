"""The audit in one figure: what a gate does to attack success and to benign answers, and what any word would do."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from casa_mech.audit.names import BASE, OWN, SAFE, UNSAFE
from casa_mech.figures import BENIGN, HARMFUL, error_bars, named_rows, style, titled

STACK = {
    "kept": ("still answered", "#BBBBBB", ""),
    "gate": ("gate: refused, for the token says unsafe", "#0072B2", ""),
    "adapter": ("adapter: refused under either token", "#56B4E9", "\\\\"),
    "conditioning": ("conditioning: flagged, falls apart", "#E69F00", "//"),
    "breakage": ("breakage: not flagged, falls apart", "#D55E00", "xx"),
    "other": ("refused, though not flagged", "#F0E442", ".."),
}
"""What becomes of the requests that the base answers: the name, colour and hatch of each part of its bar."""
_PLACEBOS = {"base placebo": ("word before the base's reply", "o"), "placebo": ("word in the token's place", "s")}
_FORCED = {UNSAFE: ("token forced to unsafe", "^"), SAFE: ("token forced to safe", "v")}
_LABELS = (("harmful", HARMFUL, -0.15), ("benign", BENIGN, 0.15))


def plot_audit(summary: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """What a gate does in one look, a row an attack: harmful requests, benign ones, a random word, forced tokens.

    The first two panels split the share that the base answers by what becomes of it behind the gate; a diamond is the
    share answered behind the gate. The third says how many answers one random word costs, the fourth how many requests
    are refused when the token is forced.

    Args:
        summary: as `AuditResult.summary` makes it.
        title: the claim.
        caption: what stands behind it.
    """
    table = _named_cells(summary)
    attacks = list(dict.fromkeys(table["attack"]))
    with style():
        size = (13.5, 1.9 + 0.4 * len(attacks))
        figure, axes = plt.subplots(1, 4, figsize=size, sharey=True, gridspec_kw={"width_ratios": (4, 4, 3, 3)})
        for axis, (label, name) in zip(
            axes, (("harmful", "attack success"), ("benign", "benign requests answered")), strict=False
        ):
            _stack(axis, table[table["label"] == label], attacks, f"{name}, base → gate")
        falls, refused = table[table["measure"] == "fall"], table[table["measure"] == "refused"]
        _points(axes[2], falls, _PLACEBOS, attacks, "answers lost to a random word")
        _points(axes[3], refused, _FORCED, attacks, "refused under a forced token")
        named_rows(axes[0], attacks)
        how = (
            "Diamonds: answered behind the gate. Points: harmful requests filled, benign ones hollow. Bars: 95 % "
            "intervals over clusters."
        )
        return titled(figure, title, f"{caption} {how}", legend_of=axes)


def _named_cells(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the surface in the attack's name where one attack is on several surfaces."""
    several = table.groupby("attack")["surface"].transform("nunique") > 1
    return table.assign(attack=table["attack"].where(~several, table["attack"] + ", " + table["surface"]))


def _stack(axis: Axes, table: pd.DataFrame, attacks: Sequence[str], name: str) -> None:
    shares = table.pivot_table(index="attack", columns=["measure", "name"], values="value").reindex(attacks)
    heights, start = np.arange(len(attacks)), np.zeros(len(attacks))
    if not table.empty:
        parts = {part: shares["fall", part] for part in STACK if part != "kept"}
        parts = {"kept": shares["answered", BASE] - sum(parts.values()), **parts}
        for part, (label, colour, hatch) in STACK.items():
            width = 100 * parts[part].fillna(0).to_numpy()
            axis.barh(
                heights, width, left=start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, height=0.7,
                label=label,
            )  # fmt: skip
            start = start + width
        after = table[(table["measure"] == "answered") & (table["name"] == OWN)].set_index("attack").reindex(attacks)
        error_bars(axis, after, heights, "black", "D", "answered behind the gate")
    n = f" (n ≥ {int(table['n'].min())})" if len(table) else " (none)"
    axis.set(xlim=(0, 103), xlabel="percent of requests", title=name + n)
    axis.grid(axis="y", visible=False)


def _points(
    axis: Axes, table: pd.DataFrame, drawn: dict[str, tuple[str, str]], attacks: Sequence[str], title: str
) -> None:
    for number, (name, (text, marker)) in enumerate(drawn.items()):
        for label, colour, shift in _LABELS:
            rows = table[(table["name"] == name) & (table["label"] == label)]
            if rows.empty:
                continue
            y = np.arange(len(attacks)) + shift + 0.12 * (number - 0.5)
            rows = rows.set_index("attack").reindex(attacks)
            error_bars(axis, rows, y, colour, marker, text, hollow=label == "benign")
    axis.set(xlim=(-3, 103), xlabel="percent of requests", title=title)
