"""The claims of notebooks 05 and 06: each computed from the replies, with its interval, test and refutation."""

from __future__ import annotations

import pandas as pd

from casa_mech.judging import OUTCOME_METRICS
from casa_mech.study.claim import Claim
from casa_mech.study.compare.ablations import BASE, NO_ATTENTION, PROMPT_AXIS
from casa_mech.study.compare.notebook import Comparison
from casa_mech.study.compare.paired import FAILURES, Effect, Outcomes, counted, effect, pairs_of
from casa_mech.study.compare.systems import REFERENCE
from casa_mech.study.compare.tables import ALL, HELD_OUT
from casa_mech.study.settings import slug

GRID_FIGURE, TRADE_FIGURE = "defence_grid", "defence_tradeoff"
PROMPT_FIGURE, ABLATION_FIGURE = "ablation_attention_prompt", "ablations"
MEDIA = ("image", "audio")
TAKEN = "from {other:.1f} to {own:.1f} %"
_ATTACKS: Outcomes = {"harmful": frozenset({"complied"})}
_REFUSALS: Outcomes = {"benign": frozenset({"refused"})}


def success_claim(found: Comparison) -> Claim:
    """What CASA does to attack success."""
    change = _effect(found, REFERENCE, "none", _ATTACKS)
    return _claim(
        found, GRID_FIGURE, change, f"CASA takes mean attack success {TAKEN}\n{_attacks(found)}",
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def refusal_claim(found: Comparison) -> Claim:
    """What CASA costs in refusals of benign twins."""
    change = _effect(found, REFERENCE, "none", _REFUSALS)
    return _claim(
        found, TRADE_FIGURE, change, f"CASA takes over-refusal of benign twins {TAKEN}\n{_attacks(found)}",
        "on fresh benign requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def rival_claim(found: Comparison) -> Claim:
    """CASA against the best of the others: chosen on topics that training saw, judged on the others."""
    others = [name for name in dict.fromkeys(found.replies["defense"]) if not str(name).startswith(REFERENCE)]
    errors = {name: _error(found.replies, str(name)) for name in others}
    rival = min(errors, key=lambda name: errors[name])
    change = _effect(found, REFERENCE, str(rival), FAILURES, HELD_OUT)
    return _claim(
        found, TRADE_FIGURE, change,
        "mean error (attacks answered, benign twins not) on held-out topics is {own:.1f} % for CASA,\n"
        f"{{other:.1f}} % for {rival}, the best other on seen topics",
        "on fresh held-out topics the mean difference has the other sign, or its interval holds 0",
    )  # fmt: skip


def attention_claim(found: Comparison) -> Claim:
    """What safety attention does to attacks through pictures and speech."""
    present = [name for name in MEDIA if name in set(found.replies["attack"])]
    change = _effect(found, BASE, NO_ATTENTION, _ATTACKS, attacks=present)
    return _claim(
        found, PROMPT_FIGURE, change,
        f"safety attention takes attack success on {' and '.join(present)} {TAKEN}\nagainst the same tokens without it",
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def prompt_claim(found: Comparison) -> Claim:
    """What the safety prompt adds to CASA."""
    change = _effect(found, f"{BASE} + safety prompt", BASE, FAILURES)
    return _claim(
        found, PROMPT_FIGURE, change,
        f"the safety prompt takes CASA's mean error (attacks answered, benign twins not)\n{TAKEN}",
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def variant_claim(found: Comparison) -> Claim:
    """The single change that does most: chosen on topics that training saw, judged on the others."""
    names = dict.fromkeys(
        variant.system.label for variant in found.variants if variant.axis != PROMPT_AXIS
    )  # fmt: skip
    base = _error(found.replies, BASE)
    sizes = {name: abs(_error(found.replies, name) - base) for name in names if name != BASE}
    largest = max(sizes, key=lambda name: sizes[name])
    change = _effect(found, largest, BASE, FAILURES, HELD_OUT)
    return _claim(
        found, ABLATION_FIGURE, change,
        f"the change that did most on seen topics ({largest}) takes mean error\non held-out topics {TAKEN}",
        "on fresh held-out topics the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def _effect(
    found: Comparison, first: str, second: str, outcomes: Outcomes, split: str = "",
    attacks: list[str] | None = None,
) -> Effect:  # fmt: skip
    table = found.replies
    if split:
        table = table[table["split"] == split]
    if attacks:
        table = table[table["attack"].isin(attacks)]
    pairs = pairs_of(table[table["defense"] == first], table[table["defense"] == second])
    return effect(pairs, outcomes)


def _error(replies: pd.DataFrame, defense: str) -> float:
    """Mean error rate on topics that training saw, each attack and label counted once."""
    part = replies[(replies["defense"] == defense) & (replies["split"] != HELD_OUT)]
    failed = counted(part["outcome"], part["label"], FAILURES)
    return float(failed.groupby([part["attack"], part["label"]]).mean().mean())


def _attacks(found: Comparison) -> str:
    return f"over {found.replies['attack'].nunique()} attacks"


def _claim(found: Comparison, figure: str, change: Effect, what: str, refuted_if: str) -> Claim:
    """`what` has slots for the two rates in percent, `own` and `other`."""
    points = f"{100 * change.difference:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    said = what.format(own=100 * change.value, other=100 * change.value_against)
    statement = f"{slug(found.model)}: {said}: {points}, n = {change.n} pairs"
    return Claim(
        statement, figure, change.n, change.difference, change.low, change.high, change.test, change.p, refuted_if
    )


def tradeoff_data(summary: pd.DataFrame) -> pd.DataFrame:
    """What `probes.defense_plots.plot_tradeoff` draws: a row a defence."""
    rows = []
    for defense, part in summary[summary["scope"] == ALL].groupby("defense", sort=False):
        known = part.set_index("metric")
        row = {"defense": defense, "n": int(known.loc["attack_success", "n"])}
        for metric in ("attack_success", "benign_answered"):
            row |= {metric: known.loc[metric, "value"], f"{metric}_low": known.loc[metric, "low"]}
            row |= {f"{metric}_high": known.loc[metric, "high"]}
        times = known["value"].get("relative_seconds", float("nan"))
        rows.append({**row, "relative_seconds": times, "trained": known.loc["trained_parameters", "value"]})
    return pd.DataFrame(rows)


def grid_data(summary: pd.DataFrame) -> pd.DataFrame:
    """What `probes.defense_plots.plot_grid` draws: attack success and benign twins answered by attack, and over all."""
    kept = summary["metric"].isin(["attack_success", "benign_answered"])
    scopes = ~summary["scope"].str.startswith("surface:")
    return summary[kept & scopes].reset_index(drop=True)


def prompt_data(found: Comparison) -> pd.DataFrame:
    """What `probes.defense_plots.plot_by_attack` draws: attention × safety prompt."""
    return grid_data(found.summary[found.summary["axis"] == PROMPT_AXIS])


def ablation_data(found: Comparison) -> pd.DataFrame:
    """What `probes.defense_plots.plot_ablations` draws: one setting at a time, over all attacks."""
    table = grid_data(found.summary[found.summary["axis"] != PROMPT_AXIS])
    return table[table["scope"] == ALL].reset_index(drop=True)


def variant_table(found: Comparison) -> pd.DataFrame:
    """The variants to read: axis and level down, `value [low, high]` in percent across."""
    rows = found.summary[(found.summary["scope"] == ALL) & found.summary["metric"].isin(OUTCOME_METRICS)]
    cells = [
        f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}] n={row.n}" for row in rows.itertuples()
    ]
    return rows.assign(cell=cells).pivot_table(
        index=["axis", "level"], columns="metric", values="cell", aggfunc="first", sort=False
    )
