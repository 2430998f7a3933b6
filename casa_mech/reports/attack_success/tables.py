"""Notebook 03: tables of the attack results."""

from __future__ import annotations

import numpy as np
import pandas as pd

from casa_mech.evaluation.evaluate import CASA
from casa_mech.judging.estimate import Estimate

RATES = (
    ("attack_success", "attack success"),
    ("refused", "harmful requests refused"),
    ("over_refusal", "benign requests refused"),
    ("benign_answered", "benign requests answered"),
)
"""The rates that are drawn, each with what to call it."""
SEPARATION = {"gate_auroc": "v_s", "token_auroc": "log-odds of the safety token, which decide"}
"""The two halves of the gate, by the metric that says how well they tell harm apart."""


def rate_data(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of `RATES`."""
    return results[results["metric"].isin([metric for metric, _ in RATES])]


def separation_data(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of `SEPARATION` under CASA."""
    return results[results["metric"].isin(list(SEPARATION)) & (results["defense"] == CASA)]


def attack_table(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A table to read: attacks down, model and defence across, `value [low, high]` in percent and n."""
    rows = results[results["metric"] == metric]
    cells = [Estimate(row.value, row.low, row.high).percent(n=row.n) for row in rows.itertuples()]
    table = rows.assign(cell=cells).pivot_table(
        index="attack", columns=["model", "defense"], values="cell", aggfunc="first", sort=False
    )
    return table.replace(np.nan, "–")
