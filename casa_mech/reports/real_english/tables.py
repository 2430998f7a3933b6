"""The gate on real English as a table to read."""

from __future__ import annotations

import pandas as pd

from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.reports.real_english.baselines import LENGTH, WORDS

BASELINE = "no model"
"""The defence that stands in the rows of baselines."""


def english_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A table to read: a row a panel and surface; AUROC and rates as `value [low, high] n=`. Empty for no rows."""
    if rows.empty:
        return rows
    columns = {
        "gate AUROC": ("gate_auroc", CASA, "both"),
        "token AUROC": ("token_auroc", CASA, "both"),
        "words alone": (WORDS, BASELINE, "both"),
        "length alone": (LENGTH, BASELINE, "both"),
        "FPR at 95 % TPR": ("gate_fpr_at_95tpr", CASA, "both"),
        "harmful flagged": ("flagged", CASA, "harmful"),
        "benign flagged": ("flagged", CASA, "benign"),
        "not refused, before": ("attack_success", PRETRAINED, "harmful"),
        "not refused, CASA": ("attack_success", CASA, "harmful"),
        "benign refused, before": ("over_refusal", PRETRAINED, "benign"),
        "benign refused, CASA": ("over_refusal", CASA, "benign"),
        "character errors": ("character_error_rate", PRETRAINED, "both"),
    }
    lines = []
    for (attack, surface), part in rows.groupby(["attack", "surface"], sort=False):
        line = {"sets": attack, "surface": surface}
        for name, (metric, defense, label) in columns.items():
            row = part[(part["metric"] == metric) & (part["defense"] == defense) & (part["label"] == label)]
            line[name] = "–" if row.empty else Estimate.of(row.iloc[0]).text(".3f", row.iloc[0]["n"])
        lines.append(line)
    return pd.DataFrame(lines)
