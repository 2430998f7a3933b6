"""Notebook 05: its claims, each computed from the replies, and what the claims of notebook 06 share with them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from casa_mech.compare.comparison import Comparison
from casa_mech.compare.paired import FAILURES, Effect, Outcomes, counted, effect, pairs_of
from casa_mech.compare.systems import REFERENCE
from casa_mech.compare.tuning import BENIGN_LOSS, UNDEFENDED
from casa_mech.judging.estimate import Estimate
from casa_mech.reports.claim import Claim, Heading
from casa_mech.reports.topics import JUDGING, chosen_on
from casa_mech.study.settings import slug

GRID_FIGURE, TRADE_FIGURE, ALPHA_FIGURE = "defence_grid", "defence_tradeoff", "coca_alpha"
ATTACK_SUCCESSES: Outcomes = {"harmful": frozenset({"complied"})}
BENIGN_REFUSALS: Outcomes = {"benign": frozenset({"refused"})}
MEAN_ERROR = "Mean error: attacks answered and benign counterparts not answered."


def success_claim(comparison: Comparison) -> Claim:
    """What CASA does to attack success."""
    change = change_between(comparison, REFERENCE, "none", ATTACK_SUCCESSES)
    return change_claim(
        comparison, GRID_FIGURE, change, f"CASA takes mean attack success {from_to(change)}", _over_attacks(comparison),
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def refusal_claim(comparison: Comparison) -> Claim:
    """What CASA costs in refusals of benign counterparts."""
    change = change_between(comparison, REFERENCE, "none", BENIGN_REFUSALS)
    return change_claim(
        comparison, TRADE_FIGURE, change, f"CASA takes over-refusal of benign counterparts {from_to(change)}",
        _over_attacks(comparison),
        "on fresh benign requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def rival_claim(comparison: Comparison) -> Claim:
    """CASA against the best of the others: chosen on topics that training saw, judged on the others."""
    others = [name for name in dict.fromkeys(comparison.replies["defense"]) if not str(name).startswith(REFERENCE)]
    errors = {name: mean_error(comparison.replies, str(name)) for name in others}
    rival = min(errors, key=lambda name: errors[name])
    change = change_between(comparison, REFERENCE, str(rival), FAILURES, JUDGING)
    choice, rest = chosen_on(comparison.replies)
    return change_claim(
        comparison, TRADE_FIGURE, change,
        f"mean error on {rest} is {100 * change.value:.1f} % for CASA, {100 * change.value_against:.1f} % for "
        f"{rival}",
        f"{MEAN_ERROR} {rival} is the best other defence on {choice}.",
        "on fresh topics of that kind the mean difference has the other sign, or its interval holds 0",
    )  # fmt: skip


def alpha_heading(comparison: Comparison) -> Heading:
    """Which alpha CoCA has in the grid, and what it costs on the calibration requests."""
    curve = comparison.curves
    curve = curve[curve["defense"] == curve["defense"].iloc[0]]
    chosen = curve[curve["chosen"]].set_index("metric")["value"]
    itself = curve[curve["alpha"] == UNDEFENDED].set_index("metric")["value"]
    alpha = float(curve.loc[curve["chosen"], "alpha"].iloc[0])
    benign, attacks = (
        f"from {100 * itself[metric]:.0f} to {100 * chosen[metric]:.0f} %"
        for metric in ("benign_answered", "attack_success")
    )
    name, loss = slug(comparison.model), f"{100 * BENIGN_LOSS:.0f} % benign loss"
    title = f"CoCA's alpha is {alpha:g}, the most safety at {loss}"
    if alpha == UNDEFENDED:
        title = f"no weight of CoCA's principle adds safety at {loss}"
    return Heading(
        f"{name}: {title}",
        f"Chosen on calibration requests of the training data, which the grid does not hold: there it takes benign "
        f"answers {benign} and attack success {attacks}.",
    )


def change_between(
    comparison: Comparison,
    first: str,
    second: str,
    outcomes: Outcomes,
    splits: Sequence[str] = (),
    attacks: Sequence[str] = (),
) -> Effect:
    """Paired change of an outcome rate from `second` to `first`, on some splits of the prompts or some attacks only."""
    replies = comparison.replies
    if splits:
        replies = replies[replies["split"].isin(splits)]
    if attacks:
        replies = replies[replies["attack"].isin(attacks)]
    pairs = pairs_of(replies[replies["defense"] == first], replies[replies["defense"] == second])
    return effect(pairs, outcomes)


def mean_error(replies: pd.DataFrame, defense: str) -> float:
    """Mean error rate on topics that training saw, each attack and label counted once."""
    seen = replies[(replies["defense"] == defense) & ~replies["split"].isin(JUDGING)]
    failed = counted(seen["outcome"], seen["label"], FAILURES)
    return float(failed.groupby([seen["attack"], seen["label"]]).mean().mean())


def from_to(change: Effect) -> str:
    """ "from 50.0 to 12.3 %", of the two rates of a change."""
    return f"from {100 * change.value_against:.1f} to {100 * change.value:.1f} %"


def change_claim(
    comparison: Comparison, figure: str, change: Effect, title: str, detail: str, refuted_if: str
) -> Claim:
    """The claim on a paired change: `title` names the two rates, the statement adds the change and `detail`."""
    points = Estimate(change.difference, change.low, change.high).times(100)
    return Claim(
        f"{slug(comparison.model)}: {title}",
        f"A difference of {points.value:+.1f} points {points.bounds('+.1f')}, n = {change.n} pairs. {detail}",
        figure, change.n, change.difference, change.low, change.high, change.test, change.p, refuted_if,
    )  # fmt: skip


def _over_attacks(comparison: Comparison) -> str:
    return f"Mean over {comparison.replies['attack'].nunique()} attacks."
