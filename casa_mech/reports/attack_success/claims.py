"""Titles and tables of the notebooks' figures: each claim is computed from the numbers it stands above."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from casa_mech.attacks import PREFILL_LENGTHS
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.study.settings import slug

KINDS = {
    "plain": ("plain",),
    "jailbreak": ("jailbreak",),
    "spelled text": ("spelled",),
    "image": ("image",),
    "speech": ("audio", "spoken"),
    "prefill": tuple(f"prefill-{length}" for length in PREFILL_LENGTHS),
}

SEPARATION = {"gate_auroc": "v_s", "token_auroc": "log-odds of the safety token, which decide"}
"""What notebook 03 asks of the two halves of the gate, by metric."""


def attack_claim(results: pd.DataFrame, models: Sequence[str]) -> str:
    """The title of the attack figure: mean attack success by kind of attack, before and after."""
    rows = results[results["metric"] == "attack_success"]
    lines = []
    for model in models:
        part = rows[rows["model"] == model]
        pieces = []
        for name, attacks in KINDS.items():
            mean = part[part["attack"].isin(attacks)].groupby("defense")["value"].mean()
            pieces.append(f"{name} {100 * mean[PRETRAINED]:.0f} → {100 * mean[CASA]:.0f} %")
        lines.append(f"{slug(model)}: " + ", ".join(pieces))
    return "Mean attack success before → after CASA, trained on plain text alone\n" + "\n".join(lines)


def token_claim(results: pd.DataFrame, models: Sequence[str]) -> str:
    """The title of the separation figure: what v_s tells apart against what the token's log-odds do."""
    lines = []
    for model in models:
        rows = results[(results["model"] == model) & (results["defense"] == CASA)]
        both = rows.pivot_table(index="attack", columns="metric", values="value")[list(SEPARATION)].dropna()
        ahead = int((both["token_auroc"] > both["gate_auroc"]).sum())
        means = both.mean()
        lines.append(
            f"{slug(model)}: the token's log-odds tell harm apart better than v_s under {ahead} of {len(both)} attacks,"
            f" mean AUROC {means['token_auroc']:.2f} against {means['gate_auroc']:.2f}"
        )
    return "\n".join(lines)


def attack_table(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A table to read: attacks down, model and defence across, `value [low, high]` in percent and n."""
    rows = results[results["metric"] == metric]
    cells = [
        Estimate(row.value, row.low, row.high).percent(n=row.n)
        for row in rows[["value", "low", "high", "n"]].itertuples()
    ]
    table = rows.assign(cell=cells).pivot_table(
        index="attack", columns=["model", "defense"], values="cell", aggfunc="first", sort=False
    )
    return table.replace(np.nan, "–")
