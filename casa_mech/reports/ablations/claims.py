"""Notebook 06: its claims, each computed from the replies."""

from __future__ import annotations

from casa_mech.compare.ablations import BASE, NO_ATTENTION, PROMPT_AXIS
from casa_mech.compare.comparison import Comparison
from casa_mech.compare.paired import FAILURES
from casa_mech.reports.claim import Claim, listed
from casa_mech.reports.defences.claims import (
    ATTACK_SUCCESSES,
    MEAN_ERROR,
    change_between,
    change_claim,
    from_to,
    mean_error,
)
from casa_mech.reports.topics import JUDGING, chosen_on

PROMPT_FIGURE, ABLATION_FIGURE = "ablation_attention_prompt", "ablations"
MEDIA = ("image", "audio")
"""Attacks through pictures and speech."""


def attention_claim(comparison: Comparison) -> Claim:
    """What safety attention does to attacks through pictures and speech."""
    attacks = [name for name in MEDIA if name in set(comparison.replies["attack"])]
    change = change_between(comparison, BASE, NO_ATTENTION, ATTACK_SUCCESSES, attacks=attacks)
    return change_claim(
        comparison, PROMPT_FIGURE, change,
        f"safety attention takes attack success on {listed(attacks)} {from_to(change)}",
        "Against the same safety tokens without it.",
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def prompt_claim(comparison: Comparison) -> Claim:
    """What the safety prompt adds to CASA."""
    change = change_between(comparison, f"{BASE} + safety prompt", BASE, FAILURES)
    return change_claim(
        comparison, PROMPT_FIGURE, change, f"the safety prompt takes CASA's mean error {from_to(change)}", MEAN_ERROR,
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def variant_claim(comparison: Comparison) -> Claim:
    """The single change that does most: chosen on topics that training saw, judged on the others."""
    summary = comparison.summary
    names = dict.fromkeys(summary[summary["axis"] != PROMPT_AXIS]["defense"])
    base = mean_error(comparison.replies, BASE)
    sizes = {name: abs(mean_error(comparison.replies, name) - base) for name in names if name != BASE}
    largest = max(sizes, key=lambda name: sizes[name])
    change = change_between(comparison, largest, BASE, FAILURES, JUDGING)
    choice, rest = chosen_on(comparison.replies)
    return change_claim(
        comparison, ABLATION_FIGURE, change, f"{largest} takes mean error on {rest} {from_to(change)}",
        f"{MEAN_ERROR} {largest} is the change that did most on {choice}.",
        "on fresh topics of that kind the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip
