"""The claims of notebook 05: each computed from the replies, with its interval, test and refutation."""

from __future__ import annotations

import pandas as pd

from casa_mech.compare.comparison import Comparison
from casa_mech.compare.paired import FAILURES, Effect, Outcomes, counted, effect, pairs_of
from casa_mech.compare.systems import REFERENCE
from casa_mech.compare.tables import ALL, HELD_OUT
from casa_mech.judging.estimate import Estimate
from casa_mech.reports.claim import Claim
from casa_mech.study.settings import slug

GRID_FIGURE, TRADE_FIGURE = "defence_grid", "defence_tradeoff"
CHANGE = "from {other:.1f} to {own:.1f} %"
ATTACK_SUCCESSES: Outcomes = {"harmful": frozenset({"complied"})}
BENIGN_REFUSALS: Outcomes = {"benign": frozenset({"refused"})}


def success_claim(found: Comparison) -> Claim:
    """What CASA does to attack success."""
    change = change_between(found, REFERENCE, "none", ATTACK_SUCCESSES)
    return change_claim(
        found, GRID_FIGURE, change, f"CASA takes mean attack success {CHANGE}\n{attack_count(found)}",
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def refusal_claim(found: Comparison) -> Claim:
    """What CASA costs in refusals of benign twins."""
    change = change_between(found, REFERENCE, "none", BENIGN_REFUSALS)
    return change_claim(
        found, TRADE_FIGURE, change, f"CASA takes over-refusal of benign twins {CHANGE}\n{attack_count(found)}",
        "on fresh benign requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def rival_claim(found: Comparison) -> Claim:
    """CASA against the best of the others: chosen on topics that training saw, judged on the others."""
    others = [name for name in dict.fromkeys(found.replies["defense"]) if not str(name).startswith(REFERENCE)]
    errors = {name: mean_error(found.replies, str(name)) for name in others}
    rival = min(errors, key=lambda name: errors[name])
    change = change_between(found, REFERENCE, str(rival), FAILURES, HELD_OUT)
    return change_claim(
        found, TRADE_FIGURE, change,
        "mean error (attacks answered, benign twins not) on held-out topics is {own:.1f} % for CASA,\n"
        f"{{other:.1f}} % for {rival}, the best other on seen topics",
        "on fresh held-out topics the mean difference has the other sign, or its interval holds 0",
    )  # fmt: skip


def change_between(
    found: Comparison, first: str, second: str, outcomes: Outcomes, split: str = "",
    attacks: list[str] | None = None,
) -> Effect:  # fmt: skip
    """Paired change of an outcome rate from `second` to `first`, on a split of the topics or some attacks only."""
    table = found.replies
    if split:
        table = table[table["split"] == split]
    if attacks:
        table = table[table["attack"].isin(attacks)]
    pairs = pairs_of(table[table["defense"] == first], table[table["defense"] == second])
    return effect(pairs, outcomes)


def mean_error(replies: pd.DataFrame, defense: str) -> float:
    """Mean error rate on topics that training saw, each attack and label counted once."""
    part = replies[(replies["defense"] == defense) & (replies["split"] != HELD_OUT)]
    failed = counted(part["outcome"], part["label"], FAILURES)
    return float(failed.groupby([part["attack"], part["label"]]).mean().mean())


def attack_count(found: Comparison) -> str:
    """ "over N attacks", for a claim's sentence."""
    return f"over {found.replies['attack'].nunique()} attacks"


def change_claim(found: Comparison, figure: str, change: Effect, what: str, refuted_if: str) -> Claim:
    """The claim on a paired change; `what` has slots for the two rates in percent, `own` and `other`."""
    points = Estimate(change.difference, change.low, change.high).times(100)
    said = what.format(own=100 * change.value, other=100 * change.value_against)
    change_in_points = f"{points.value:+.1f} points {points.bounds('+.1f')}"
    statement = f"{slug(found.model)}: {said}: {change_in_points}, n = {change.n} pairs"
    return Claim(
        statement, figure, change.n, change.difference, change.low, change.high, change.test, change.p, refuted_if
    )


def tradeoff_data(summary: pd.DataFrame) -> pd.DataFrame:
    """What `plots.plot_tradeoff` draws: a row a defence."""
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
    """What `plots.plot_grid` draws: attack success and benign twins answered by attack, and over all."""
    kept = summary["metric"].isin(["attack_success", "benign_answered"])
    scopes = ~summary["scope"].str.startswith("surface:")
    return summary[kept & scopes].reset_index(drop=True)
