"""Notebook 03: the headings of its figures and its claims, each computed from the replies that it stands on."""

from __future__ import annotations

import pandas as pd

from casa_mech.attacks import PREFILL_LENGTHS, STUDY_ATTACKS
from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.queries import Label
from casa_mech.reports.attack_success.tables import SEPARATION
from casa_mech.reports.claim import Claim, Heading
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
    """How well v_s tells harm apart against how well the token's log-odds do."""
    sentences = []
    for model in study.models:
        rows = results[(results["model"] == model) & (results["defense"] == CASA)]
        aurocs = rows.pivot_table(index="attack", columns="metric", values="value")[list(SEPARATION)].dropna()
        ahead, means = int((aurocs["token_auroc"] > aurocs["gate_auroc"]).sum()), aurocs.mean()
        sentences.append(
            f"{slug(model)}: the token's log-odds beat v_s under {ahead} of {len(aurocs)} attacks (AUROC "
            f"{means['token_auroc']:.2f} against {means['gate_auroc']:.2f})"
        )
    return Heading(
        sentences[0], " ".join(["AUROCs are means over the attacks.", *(f"{each}." for each in sentences[1:])])
    )


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
