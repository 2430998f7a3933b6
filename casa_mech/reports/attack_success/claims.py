"""Notebook 03: the headings of its figures and its claims, each computed from the replies that it stands on."""

from __future__ import annotations

import math

import pandas as pd

from casa_mech.attacks import PREFILL_LENGTHS
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.queries import Label
from casa_mech.reports.attack_success.tables import GAIN, SEPARATION, replies_of, separation_data
from casa_mech.reports.claim import Claim, Heading, span
from casa_mech.study.settings import slug
from casa_mech.study.study import Study

KINDS = {
    "plain": ("plain",),
    "jailbreak": ("jailbreak",),
    "spelled text": ("spelled",),
    "image": ("image",),
    "speech": ("audio", "spoken"),
    "prefill": tuple(f"prefill-{length}" for length in PREFILL_LENGTHS),
}
"""The attacks of the study, by kind."""
_TEST = "paired permutation over topics and, over several gates, a bootstrap over topics and gates: the larger p"


def token_heading(study: Study, results: pd.DataFrame) -> Heading:
    """What v_s adds to the ranking by the raw pair, attack by attack, and the mean AUROCs of the three."""
    rows = separation_data(results)
    titles, sentences = [], []
    for model in study.models:
        of_model = rows[rows["model"] == model]
        gains = of_model[of_model["metric"] == GAIN].set_index("attack")
        above, below = gains[gains["low"] > 0], gains[gains["high"] < 0]
        titles.append(
            f"{slug(model)}: no raw pair in these replies, made by an older version; remove them to compare"
            if gains.empty
            else f"{slug(model)}: attention raises the raw pair's AUROC under {len(above)} of {len(gains)} attacks, "
            f"lowers it under {len(below)}"
        )
        parts = (("raised", above), ("lowered", below))
        named = [f"{name} ({', '.join(part.index)})" for name, part in parts if len(part)]
        means = of_model.groupby("metric")["value"].mean()
        aurocs = " / ".join(f"{means.get(metric, math.nan):.2f}" for metric in SEPARATION)
        change = f"; by {span(gains['value'], '+.3f')}" if len(gains) else ""
        sentences.append(f"{slug(model)}: {aurocs}{change}{''.join(f'; {text}' for text in named)}.")
    caption = (
        "Mean AUROC over the attacks of raw pair / v_s / both; the change is counted where its interval leaves 0 out. "
    )
    return Heading(titles[0], caption + " ".join([*(f"{title}." for title in titles[1:]), *sentences]))


def attack_claims(study: Study, results: pd.DataFrame) -> list[Claim]:
    """The claims of the notebook: attack success, benign refusals, what the fall is made of, the control."""
    claims = [success_claim(study, results), refusal_claim(study), fall_claim(study)]
    return claims + ([control_claim(study)] if len(study.models) > 1 else [])


def success_claim(study: Study, results: pd.DataFrame) -> Claim:
    """What CASA does to attack success on the model under study, over all attacks."""
    replies = _paired_replies(study, study.settings.model, study.attacks, "harmful")
    after, before = (replies[name] == "complied" for name in (CASA, PRETRAINED))
    change, p = _change(study, replies, after, before)
    rates = results[(results["metric"] == "attack_success") & results["defense"].isin([PRETRAINED, CASA])]
    by_model = " ".join(f"{slug(model)}: {_by_kind(rates[rates['model'] == model])}." for model in study.models)
    return Claim(
        f"{study.title}: CASA, trained on plain text alone, takes mean attack success {_from_to(before, after)}",
        f"{_points(change)} over {len(study.attacks)} attacks. {_by_gate(replies, after, before)} Mean attack success "
        f"before → after CASA, by kind of attack. {by_model}",
        "attack_success", len(replies), *change, _TEST, p,
        "on fresh requests and gates the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def refusal_claim(study: Study) -> Claim:
    """What CASA costs in refusals of benign requests under the same attacks."""
    replies = _paired_replies(study, study.settings.model, study.benign_attacks, "benign")
    after, before = (replies[name] == "refused" for name in (CASA, PRETRAINED))
    change, p = _change(study, replies, after, before)
    return Claim(
        f"{study.title}: CASA takes over-refusal of benign requests {_from_to(before, after)}",
        f"{_points(change)} over {len(study.benign_attacks)} attacks. {_by_gate(replies, after, before)}",
        "attack_success", len(replies), *change, _TEST, p,
        "on fresh benign requests and gates the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def fall_claim(study: Study) -> Claim:
    """Whether refusals or replies that fall apart make up more of what attack success loses."""
    replies = _paired_replies(study, study.settings.model, study.attacks, "harmful")
    ends = {
        name: replies[name].where(replies[name].isin(["complied", "refused"]), "failed") for name in (CASA, PRETRAINED)
    }
    more = {end: (ends[CASA] == end).astype(float) - (ends[PRETRAINED] == end) for end in ("refused", "failed")}
    difference, p = _change(study, replies, more["refused"], more["failed"])
    refused, failed = (100 * more[end].mean() for end in ("refused", "failed"))
    flagged = replies["safety_token"] == "unsafe"
    return Claim(
        f"{study.title}: under CASA refusals of attacked requests change by {refused:+.0f} points, replies that fall "
        f"apart by {failed:+.0f}",
        f"A difference of {difference.times(100).text('+.1f')} points over {len(study.attacks)} attacks. CASA flags "
        f"{_share(flagged)} of the requests: {_share(flagged & (ends[CASA] == 'refused'))} are flagged and refused, "
        f"{_share(flagged & (ends[CASA] == 'complied'))} flagged and answered all the same, "
        f"{_share(flagged & (ends[CASA] == 'failed'))} flagged and fall apart.",
        "reply_paths", len(replies), *difference, _TEST, p,
        "on fresh requests and gates the difference between the two has the other sign, or its interval holds 0",
    )  # fmt: skip


def control_claim(study: Study) -> Claim:
    """Whether CASA takes more off attack success on the model under study than on the control."""
    sides = []
    for model in study.models[:2]:
        replies = _paired_replies(study, model, study.attacks, "harmful")
        change = (replies[CASA] == "complied").astype(float) - (replies[PRETRAINED] == "complied")
        sides.append(replies.assign(change=change).set_index(["attack", "query_id", "topic", "gate_seed"])["change"])
    both = pd.concat(sides, axis=1, keys=["first", "second"], join="inner").reset_index()
    difference, p = _change(study, both, both["first"], both["second"])
    first, second = (slug(model) for model in study.models[:2])
    means = 100 * both[["first", "second"]].mean()
    return Claim(
        f"CASA changes attack success by {means['first']:+.0f} points on {first}, {means['second']:+.0f} on {second}",
        f"A difference of {difference.times(100).text('+.1f')} points on the same requests under {len(study.attacks)} "
        "attacks. Where the two differ before CASA, part of this is how much there is to take off.",
        "attack_success", len(both), *difference, _TEST, p,
        "on fresh requests and gates the difference has the other sign, or its interval holds 0",
    )  # fmt: skip


def _paired_replies(study: Study, model: str, attacks: tuple[str, ...], label: Label) -> pd.DataFrame:
    """How each gate's reply ended and how the pretrained model's to the same request did.

    Columns `attack, query_id, topic, gate_seed, safety_token`, and the two outcomes under `CASA` and `PRETRAINED`.
    """
    same = ["attack", "query_id"]
    gated, base = (replies_of(study, model, defense, attacks, label) for defense in (CASA, PRETRAINED))
    gated = gated[[*same, "topic", "gate_seed", "safety_token", "outcome"]].rename(columns={"outcome": CASA})
    base = base[[*same, "outcome"]].rename(columns={"outcome": PRETRAINED})
    return gated.merge(base, on=same, validate="m:1")


def _change(study: Study, replies: pd.DataFrame, after: pd.Series, before: pd.Series) -> tuple[Estimate, float]:
    """The mean of `after` less `before`, row by row of `replies`, and the p of its paired test."""
    first, second = (side.astype(float).to_numpy() for side in (after, before))
    topics, runs = replies["topic"].tolist(), replies["gate_seed"].tolist()
    return paired_difference(first, second, topics, study.settings.seed, outcomes=True, runs=runs)


def _from_to(before: pd.Series, after: pd.Series) -> str:
    return f"from {100 * before.mean():.0f} to {100 * after.mean():.0f} %"


def _points(change: Estimate) -> str:
    points = change.times(100)
    return f"A change of {points.value:+.1f} points {points.bounds('.1f')}"


def _share(hits: pd.Series) -> str:
    return f"{100 * hits.mean():.0f} %"


def _by_gate(replies: pd.DataFrame, after: pd.Series, before: pd.Series) -> str:
    """The change of each gate, in words."""
    changes = 100 * (after.astype(float) - before.astype(float)).groupby(replies["gate_seed"]).mean()
    if len(changes) < 2:
        return "Of one gate; another training may differ."
    return f"Gate by gate {', '.join(f'{change:+.1f}' for change in changes)}."


def _by_kind(rates: pd.DataFrame) -> str:
    changes = []
    own = dict.fromkeys(rates["attack"])
    # The columns of another plan are no attacks of the registry, and stand for themselves.
    kinds = (
        KINDS if own.keys() <= {name for names in KINDS.values() for name in names} else {name: (name,) for name in own}
    )
    for kind, attacks in kinds.items():
        mean = 100 * rates[rates["attack"].isin(attacks)].groupby("defense")["value"].mean()
        changes.append(f"{kind} {mean[PRETRAINED]:.0f} → {mean[CASA]:.0f} %")
    return ", ".join(changes)
