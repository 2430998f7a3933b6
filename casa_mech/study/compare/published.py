"""The paper's own numbers beside a comparison: a panel of their own, with the arithmetic that can be checked."""

from __future__ import annotations

import math
from dataclasses import asdict

import pandas as pd

from casa_mech.judging import check_published, published_rates
from casa_mech.judging.published import four_set_mean, reduction

PANEL_COLUMNS = ("table", "model", "defense", "attack", "value", "low", "high", "n")
NOT_MEASURED = "Published by CASA's authors (arXiv 2604.00310), not measured here"


def published_panel() -> pd.DataFrame:
    """`PANEL_COLUMNS`, fractions: the main table and the 3B ablation as printed.

    Intervals are Wilson's under the smallest test-set size that fits all rates of a benchmark; NaN where none does.
    """
    rows = []
    for rate in published_rates():
        low, high = rate.interval() or (math.nan, math.nan)
        ablated = "attention" if rate.attention else "no attention"
        rows.append(
            {
                "table": rate.table,
                "model": f"Qwen2.5-Omni-{rate.model_size}",
                "defense": (ablated if rate.table == "ablation" else rate.model)
                + (" + safety prompt" if rate.safety_prompt else ""),
                "attack": rate.benchmark,
                "value": rate.value,
                "low": low,
                "high": high,
                "n": rate.n if math.isfinite(low) else None,
            }
        )
    return pd.DataFrame(rows, columns=list(PANEL_COLUMNS)).astype({"n": "Int64"})


def published_means() -> pd.DataFrame:
    """Mean of each main-table row over its four benchmarks, and its change against the pretrained model, in percent."""
    names = dict.fromkeys(
        (rate.model_size, rate.model, rate.safety_prompt) for rate in published_rates() if rate.table == "main"
    )
    return pd.DataFrame(
        [
            {
                "model": f"Qwen2.5-Omni-{size}",
                "defense": model + (" + safety prompt" if prompt else ""),
                "mean of four, %": round(four_set_mean(model, size, prompt), 2),
                "against pretrained, %": round(reduction(model, size, prompt), 1),
            }
            for size, model, prompt in names
        ]
    )


def published_checks() -> pd.DataFrame:
    """What arithmetic alone says of the published numbers: `check, found, holds`."""
    return pd.DataFrame([asdict(finding) for finding in check_published()])
