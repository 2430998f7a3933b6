"""The claims of notebook 06: each computed from the replies, with its interval, test and refutation."""

from __future__ import annotations

import pandas as pd

from casa_mech.compare.ablations import BASE, NO_ATTENTION, PROMPT_AXIS
from casa_mech.compare.comparison import Comparison
from casa_mech.compare.paired import FAILURES
from casa_mech.compare.tables import ALL, HELD_OUT
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.merit import OUTCOME_METRICS
from casa_mech.reports.claim import Claim
from casa_mech.reports.defences.claims import (
    ATTACK_SUCCESSES,
    CHANGE,
    change_between,
    change_claim,
    grid_data,
    mean_error,
)

PROMPT_FIGURE, ABLATION_FIGURE = "ablation_attention_prompt", "ablations"


MEDIA = ("image", "audio")


def attention_claim(found: Comparison) -> Claim:
    """What safety attention does to attacks through pictures and speech."""
    present = [name for name in MEDIA if name in set(found.replies["attack"])]
    change = change_between(found, BASE, NO_ATTENTION, ATTACK_SUCCESSES, attacks=present)
    return change_claim(
        found, PROMPT_FIGURE, change,
        f"safety attention takes attack success on {' and '.join(present)} {CHANGE}\n"
        "against the same tokens without it",
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def prompt_claim(found: Comparison) -> Claim:
    """What the safety prompt adds to CASA."""
    change = change_between(found, f"{BASE} + safety prompt", BASE, FAILURES)
    return change_claim(
        found, PROMPT_FIGURE, change,
        f"the safety prompt takes CASA's mean error (attacks answered, benign twins not)\n{CHANGE}",
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def variant_claim(found: Comparison) -> Claim:
    """The single change that does most: chosen on topics that training saw, judged on the others."""
    names = dict.fromkeys(
        variant.system.label for variant in found.variants if variant.axis != PROMPT_AXIS
    )  # fmt: skip
    base = mean_error(found.replies, BASE)
    sizes = {name: abs(mean_error(found.replies, name) - base) for name in names if name != BASE}
    largest = max(sizes, key=lambda name: sizes[name])
    change = change_between(found, largest, BASE, FAILURES, HELD_OUT)
    return change_claim(
        found, ABLATION_FIGURE, change,
        f"the change that did most on seen topics ({largest}) takes mean error\non held-out topics {CHANGE}",
        "on fresh held-out topics the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def prompt_data(found: Comparison) -> pd.DataFrame:
    """What `plots.plot_by_attack` draws: attention × safety prompt."""
    return grid_data(found.summary[found.summary["axis"] == PROMPT_AXIS])


def ablation_data(found: Comparison) -> pd.DataFrame:
    """What `plots.plot_ablations` draws: one setting at a time, over all attacks."""
    table = grid_data(found.summary[found.summary["axis"] != PROMPT_AXIS])
    return table[table["scope"] == ALL].reset_index(drop=True)


def variant_table(found: Comparison) -> pd.DataFrame:
    """The variants to read: axis and level down, `value [low, high]` in percent across."""
    rows = found.summary[(found.summary["scope"] == ALL) & found.summary["metric"].isin(OUTCOME_METRICS)]
    cells = [Estimate(row.value, row.low, row.high).percent(n=row.n) for row in rows.itertuples()]
    return rows.assign(cell=cells).pivot_table(
        index=["axis", "level"], columns="metric", values="cell", aggfunc="first", sort=False
    )
