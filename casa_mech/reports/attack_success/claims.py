"""Notebook 03: the headings of its figures and its claims, each computed from the replies that it stands on."""

from __future__ import annotations

import math

import pandas as pd

from casa_mech.attacks import PREFILL_LENGTHS, STUDY_ATTACKS
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.queries import Label
from casa_mech.reports.attack_success.tables import GAIN, SEPARATION, separation_data
from casa_mech.reports.claim import Claim, Heading, span
from casa_mech.study.settings import slug
from casa_mech.study.study import BENIGN_ATTACKS, Study

KINDS = {
    "plain": ("plain",),
    "jailbreak": ("jailbreak",),
    "spelled text": ("spelled",),
    "image": ("image",),
    "speech": ("audio", "spoken"),
    "prefill": tuple(f"prefill-{length}" for length in PREFILL_LENGTHS),
}
"""The attacks of the study, by kind."""


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


def success_claim(study: Study, results: pd.DataFrame) -> Claim:
    """What CASA does to attack success on the model under study, over all attacks."""
    replies = _paired_replies(study, STUDY_ATTACKS, "harmful", "complied")
    change, p = _change(study, replies)
    rates = results[(results["metric"] == "attack_success") & results["defense"].isin([PRETRAINED, CASA])]
    by_model = " ".join(f"{slug(model)}: {_by_kind(rates[rates['model'] == model])}." for model in study.models)
    return Claim(
        f"{study.name}: CASA, trained on plain text alone, takes mean attack success {_from_to(replies)}",
        f"{_points(change)} over {len(STUDY_ATTACKS)} attacks. Mean attack success before → after CASA, by kind of "
        f"attack. {by_model}",
        "attack_success", len(replies), *change, "paired permutation over topics", p,
        "on fresh requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def refusal_claim(study: Study) -> Claim:
    """What CASA costs in refusals of benign requests under the same attacks."""
    replies = _paired_replies(study, BENIGN_ATTACKS, "benign", "refused")
    change, p = _change(study, replies)
    return Claim(
        f"{study.name}: CASA takes over-refusal of benign requests {_from_to(replies)}",
        f"{_points(change)} over {len(BENIGN_ATTACKS)} attacks.",
        "attack_success", len(replies), *change, "paired permutation over topics", p,
        "on fresh benign requests the mean change has the other sign, or its interval holds 0",
    )  # fmt: skip


def _paired_replies(study: Study, attacks: tuple[str, ...], label: Label, outcome: str) -> pd.DataFrame:
    """Whether a reply has `outcome`, before and after CASA: `attack, query_id, topic` and a column a defence."""
    cells = [
        study.replies(study.settings.model, defense, attack, label).assign(attack=attack)
        for defense in (PRETRAINED, CASA)
        for attack in attacks
    ]
    replies = pd.concat(cells, ignore_index=True)
    replies = replies.assign(hit=(replies["outcome"] == outcome).astype(float))
    index = ["attack", "query_id", "topic"]
    return replies.pivot_table(index=index, columns="defense", values="hit", sort=False).reset_index()


def _change(study: Study, replies: pd.DataFrame) -> tuple[Estimate, float]:
    """The mean change from before to after CASA, and the p of its paired test."""
    topics = replies["topic"].tolist()
    return paired_difference(replies[CASA], replies[PRETRAINED], topics, study.settings.seed, outcomes=True)


def _from_to(replies: pd.DataFrame) -> str:
    return f"from {100 * replies[PRETRAINED].mean():.0f} to {100 * replies[CASA].mean():.0f} %"


def _points(change: Estimate) -> str:
    points = change.times(100)
    return f"A change of {points.value:+.1f} points {points.bounds('.1f')}"


def _by_kind(rates: pd.DataFrame) -> str:
    changes = []
    for kind, attacks in KINDS.items():
        mean = 100 * rates[rates["attack"].isin(attacks)].groupby("defense")["value"].mean()
        changes.append(f"{kind} {mean[PRETRAINED]:.0f} → {mean[CASA]:.0f} %")
    return ", ".join(changes)
