"""Notebook 04's claims, each computed from the replies it stands on, and the reference panel of published numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from casa_mech.evaluation.evaluate import CASA, PRETRAINED
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import PERMUTATIONS, label_permutation_test, paired_difference, permutation_test
from casa_mech.reports.benchmarks.judges import ALL, COMPLIED, JudgeTables
from casa_mech.reports.benchmarks.tables import NO, YES, common
from casa_mech.reports.claim import Claim
from casa_mech.study import Study
from casa_mech.study.settings import slug


def success_claim(study: Study, replies: pd.DataFrame, read: pd.DataFrame) -> Claim:
    """Attack success before and after CASA, over the attacks that the model reads (all, where that is not known).

    What becomes of the benign twins stands in the same sentence: a gate that spoils every answer would succeed, too.
    """
    chosen = _attacks(read, YES) or _attacks(read, "")
    wide = _paired(study, replies, chosen, "harmful")
    twins = 100 * _paired(study, replies, chosen, "benign")[[PRETRAINED, CASA]].mean()
    before, after = wide[PRETRAINED], wide[CASA]
    topics = wide["topic"].tolist()
    change, p = paired_difference(after, before, topics, study.settings.seed)
    points = change.times(100)
    last = 100 * wide.groupby("attack", sort=False)[CASA].mean().sort_values(ascending=False)
    which = "that it reads" if _attacks(read, YES) else "there are"
    statement = (
        f"{slug(study.settings.model)}: over the {len(chosen)} attacks {which}, CASA takes mean success from "
        f"{100 * before.mean():.0f} to {100 * after.mean():.0f} %, a change of {points.text('.1f')} "
        f"points,\nand benign twins answered from {twins[PRETRAINED]:.0f} to {twins[CASA]:.0f} %; most is left of "
        f"{last.index[0]} ({last.iloc[0]:.0f} %)"
    )
    return Claim(
        statement, "attack_benchmarks", len(wide), *points, "paired permutation over topics", p,
        "on fresh requests the mean change has the other sign, its interval holds 0, or the twins' answers fall as far",
    )  # fmt: skip


def reading_claim(study: Study, replies: pd.DataFrame, read: pd.DataFrame) -> Claim:
    """What the attacks that the model cannot read fail for: whether it refuses them more than their benign twins."""
    chosen = _attacks(read, NO)
    name = slug(study.settings.model)
    if not chosen:
        statement = f"{name}: no attack is known to be unreadable to it"
        return Claim(
            statement, "attack_reading", len(read), 0.0, 0.0, 0.0, "none", 1.0, "an attack that it cannot read"
        )
    part = common(study, replies[(replies["defense"] == PRETRAINED) & replies["attack"].isin(chosen)])
    harmful = (part["label"] == "harmful").to_numpy()
    refused = (part["outcome"] == "refused").to_numpy().astype(float)
    complied = (part["outcome"] == COMPLIED).to_numpy().astype(float)
    topics, shares = part["topic"].to_numpy(), [100 * kind[harmful].mean() for kind in (complied, refused)]
    gap = _gap(refused, harmful, topics, study.settings.seed)
    statement = (
        f"{name}: it cannot read {len(chosen)} of {len(read)} attacks (benign twins answered "
        f"{100 * complied[~harmful].mean():.0f} %). Before CASA {shares[0]:.0f} % succeed there,\n{shares[1]:.0f} % "
        f"are refused ({gap.value:+.1f} {gap.bounds('.1f')} points against the twins), and "
        f"{100 - sum(shares):.0f} % get a wrong or incoherent answer"
    )
    return Claim(
        statement, "attack_reading", len(part), *gap,
        f"labels permuted over topics, {PERMUTATIONS} draws",
        _label_permutation(refused, harmful, topics, study.settings.seed),
        "low success there is safety and not inability if most failures are refusals that the twins do not get",
    )  # fmt: skip


def judge_claims(study: Study, tables: JudgeTables | None) -> list[Claim]:
    """What the first of the other judges counts beyond the reference; nothing where there is but one judge."""
    return [_judge_claim(study, tables)] if tables is not None else []


def _judge_claim(study: Study, tables: JudgeTables) -> Claim:
    judge, which = _first_judge(tables)
    rows = tables.measures.query("judge == @judge and attacks == @which").set_index("measure")
    kappa = rows.loc["cohen_kappa"]
    counts = tables.counts[tables.counts["judge"] == judge].set_index(["defense", "attack"])
    whole, overall = counts.loc[(ALL, which)], counts.loc[(ALL, ALL)]
    asked = tables.outcomes[tables.outcomes[judge].notna() & tables.outcomes["attack"].isin(tables.attacks(which))]
    said, true = ((asked[name] == COMPLIED).to_numpy().astype(float) for name in (judge, tables.reference))
    excess, everywhere = (
        Estimate(*(float(100 * row[name]) for name in ("excess", "low", "high"))) for row in (whole, overall)
    )
    statement = (
        f"{slug(study.settings.model)}: on the same replies to {which}, the {judge} judge counts "
        f"{100 * whole['success']:.0f} % success where the {tables.reference} judge counts "
        f"{100 * whole['reference']:.0f} %:\n{excess.value:+.1f} {excess.bounds('.1f')} points; Cohen's kappa "
        f"{Estimate.of(kappa).text()}. On {ALL}: {everywhere.value:+.1f} {everywhere.bounds('.1f')} points"
    )
    return Claim(
        statement, "judge_agreement", int(whole["n"]), *excess, "paired permutation over topics",
        permutation_test(said, true, asked["topic"].tolist(), study.settings.seed),
        "on fresh replies the difference of the two counts has an interval that holds 0",
    )  # fmt: skip


def _first_judge(tables: JudgeTables) -> tuple[str, str]:
    """The first of the other judges, and the attacks that it is looked at on: those that are read, else all."""
    first = tables.measures.iloc[0]
    return str(first["judge"]), str(first["attacks"])


def attack_data(results: pd.DataFrame) -> pd.DataFrame:
    """What `plots.plot_attacks` draws."""
    return results[results["metric"].isin(["attack_success", "over_refusal", "benign_answered", "gate_auroc"])]


def judge_data(tables: JudgeTables) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """What `plots.plot_judges` draws, of the first judge: counts, confusion, reference."""
    judge, which = _first_judge(tables)
    counts = tables.counts[(tables.counts["judge"] == judge) & (tables.counts["defense"] != ALL)]
    confusion = tables.confusion[(tables.confusion["judge"] == judge) & (tables.confusion["attacks"] == which)]
    return counts, confusion, tables.reference


def outcome_data(replies: pd.DataFrame) -> pd.DataFrame:
    """What `plots.plot_reading` draws: shares of outcomes before CASA, by attack and label."""
    part = replies[replies["defense"] == PRETRAINED]
    counts = part.groupby(["attack", "label", "outcome"], sort=False).size().rename("k").reset_index()
    counts["n"] = counts.groupby(["attack", "label"])["k"].transform("sum")
    return counts.assign(share=counts["k"] / counts["n"])


def _attacks(read: pd.DataFrame, reads: str) -> list[str]:
    """The attacks of one answer to "does the model read it", or all of them."""
    return [str(name) for name in (read[read["reads"] == reads] if reads else read)["attack"]]


def _paired(study: Study, replies: pd.DataFrame, attacks: list[str], label: str) -> pd.DataFrame:
    """Whether each request of `label` was answered under each attack: `attack, query_id, topic`, a column a defence."""
    part = common(study, replies[(replies["label"] == label) & replies["attack"].isin(attacks)])
    part = part.assign(complied=(part["outcome"] == COMPLIED).astype(float))
    index = ["attack", "query_id", "topic"]
    return part.pivot_table(index=index, columns="defense", values="complied", sort=False).reset_index()


def _gap(values: np.ndarray, harmful: np.ndarray, topics: np.ndarray, seed: int) -> Estimate:
    """Difference of the harmful and the benign mean in points, with a bootstrap over topics."""
    from casa_mech.judging.bootstrap import bootstrap_interval

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [weights[:, kind] @ values[kind] / weights[:, kind].sum(axis=1) for kind in (harmful, ~harmful)]
            return 100 * (means[0] - means[1])

    value = 100 * float(values[harmful].mean() - values[~harmful].mean())
    low, high = bootstrap_interval(statistic, topics.tolist(), len(values), seed)
    return Estimate(value, low, high).widened()


def _label_permutation(values: np.ndarray, harmful: np.ndarray, topics: np.ndarray, seed: int) -> float:
    """Two-sided p of the difference of means."""

    def gap(labels: np.ndarray) -> np.ndarray:
        means = [kind @ values / kind.sum(axis=1) for kind in (labels, ~labels)]
        return np.abs(means[0] - means[1])

    return label_permutation_test(gap, harmful, topics, seed)
