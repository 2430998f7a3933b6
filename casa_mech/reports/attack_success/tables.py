"""Notebook 03: tables of the attack results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from casa_mech.audit.names import PATHS
from casa_mech.audit.result import path_of
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.merit import BESIDE, NOT_REFUSED, with_not_refused
from casa_mech.judging.stats import clusters_of, rate_interval, runs_of
from casa_mech.judging.verdict import UNDECIDED
from casa_mech.queries import Label
from casa_mech.study import Study

RATES = (
    ("attack_success", "attack success"),
    ("over_refusal", "benign requests refused"),
    ("benign_answered", "benign requests answered"),
)
"""The rates that are drawn, each with what to call it; beside attack success stands what was not refused."""
SEPARATION = {
    "raw_token_auroc": "raw pair: the token's log-odds before v_s",
    "gate_auroc": "v_s",
    "token_auroc": "rewritten pair: both, which decide",
}
"""The two halves of the gate and what they make together, by the metric that says how well they tell harm apart."""
GAIN = "token_auroc_gain"
"""What safety attention adds to the raw pair: the rewritten pair's AUROC minus the raw pair's."""


def rate_data(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of `RATES` and `merit.BESIDE`, with the columns `merit.NOT_REFUSED`."""
    return with_not_refused(results[results["metric"].isin([*(metric for metric, _ in RATES), *BESIDE])])


def separation_data(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of `SEPARATION` and `GAIN` under CASA; replies of an older version have none of the raw pair."""
    return results[results["metric"].isin([*SEPARATION, GAIN]) & (results["defense"] == CASA)]


def replies_of(study: Study, model: str, defense: str, attacks: Sequence[str], label: Label) -> pd.DataFrame:
    """Replies under `attacks` to requests of a label, with the column `attack`; under CASA those of every gate."""
    gates = study.gate_numbers if defense != PRETRAINED else (0,)
    cells = [
        study.replies(model, defense, attack, label, gate).assign(attack=attack) for gate in gates for attack in attacks
    ]
    return pd.concat(cells, ignore_index=True)


def path_data(study: Study) -> pd.DataFrame:
    """What becomes of harmful requests under each attack: `model, defense, attack, path, n, value, low, high`.

    The paths are the audit's (`audit.result.PATHS`), in its order; shares of the decided replies, averaged over gates.
    """
    rows = []
    for model in study.models:
        for defense in (PRETRAINED, CASA):
            replies = replies_of(study, model, defense, study.attacks, "harmful")
            for attack, cell in replies[replies["outcome"] != UNDECIDED].groupby("attack", sort=False):
                taken, clusters, runs = path_of(cell), clusters_of(cell), runs_of(cell)
                for path in PATHS:
                    share = rate_interval(taken == path, clusters, study.settings.seed, runs=runs)
                    where = {"model": model, "defense": defense, "attack": attack, "path": path, "n": len(cell)}
                    rows.append({**where, **share._asdict()})
    return pd.DataFrame(rows)


def attack_table(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A table to read: attacks down, model and defence across, `value [low, high]` in percent and n.

    Beside attack success stands the share of requests that were not refused.
    """
    rows = with_not_refused(results)
    rows = rows[rows["metric"] == metric]
    if rows.empty:
        return pd.DataFrame({"note": [f"no replies here have the rate {metric}"]})
    cells = [_cell(row) for row in rows.to_dict("records")]
    table = rows.assign(cell=cells).pivot_table(
        index="attack", columns=["model", "defense"], values="cell", aggfunc="first", sort=False
    )
    return table.replace(np.nan, "–")


def _cell(row: Mapping[str, Any]) -> str:
    text = Estimate.of(row).percent(n=row["n"])
    beside = Estimate(*(row[name] for name in NOT_REFUSED))
    return text if np.isnan(beside.value) else f"{text}; not refused {beside.percent()}"
