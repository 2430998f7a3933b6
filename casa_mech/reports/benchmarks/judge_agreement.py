"""Other judges on the benchmark replies: how far each agrees with the exact judge, and how much success it counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.identity import key_digest
from casa_mech.judging import Judge, KeywordJudge, MicroWorldJudge, agreement, judge_all, load_judge
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import mean_difference
from casa_mech.judging.results import value_row
from casa_mech.judging.verdict import UNDECIDED, judge_identity
from casa_mech.queries import Query
from casa_mech.reports.benchmarks.tables import COMPLIED, YES, attacks_that, common
from casa_mech.study import Study
from casa_mech.study.settings import slug

ALL, READ = "all attacks", "the attacks that it reads"
FURTHER_REPLIES = 20
"""Harmful replies of each attack and defence that a judge which costs time or money gives a verdict on."""


@dataclass(frozen=True)
class JudgeTables:
    """Judges held against each other on the same harmful replies."""

    reference: str
    """The judge that the others are held against, the exact one where there is one."""
    outcomes: pd.DataFrame
    """`defense, attack, topic, query_id`, and a column a judge; NaN where it was not consulted."""
    readable: tuple[str, ...]
    """The attacks that the model reads."""
    measures: pd.DataFrame
    """Agreement on "complied" against the rest: `judge, attacks, measure, n, value, low, high`; `attacks` is `READ` or
    `ALL`."""
    confusion: pd.DataFrame
    """`judge, attacks, reference, judged, n, share, low, high`."""
    counts: pd.DataFrame
    """Attack success by either judge, and the difference with an interval over topics: `judge, defense, attack, n,
    undecided, success, reference, excess, low, high`; `attack` may be `READ` or `ALL`."""

    def attacks(self, which: str) -> tuple[str, ...]:
        """The attacks behind `ALL` or `READ`."""
        return self.readable if which == READ else tuple(dict.fromkeys(self.outcomes["attack"]))

    @property
    def first_judge(self) -> tuple[str, str]:
        """The first of the other judges, and the attacks that it is looked at on: those that are read, else all."""
        first = self.measures.iloc[0]
        return str(first["judge"]), str(first["attacks"])


def judge_tables(
    study: Study, replies: pd.DataFrame, readable: pd.DataFrame, further: Sequence[Judge] = ()
) -> JudgeTables | None:
    """The keyword judge, and any `further` one, against the exact judge; None where there is but one judge.

    Args:
        study: in whose run folder the verdicts of further judges are kept; a stopped judgement goes on from them.
        replies: of `tables.all_replies`; the harmful ones that all attacks share are judged.
        readable: of `tables.readability`.
        further: judges as of `load_judge`; each gives verdicts on the first `FURTHER_REPLIES` of each cell.

    Raises:
        RunError: a judge is down; its verdicts so far are kept.
    """
    harmful = common(study, replies[replies["label"] == "harmful"]).reset_index(drop=True)
    outcomes = harmful[["defense", "attack", "topic", "query_id"]].copy()
    if set(harmful["judge"]) == {MicroWorldJudge.name}:
        outcomes[MicroWorldJudge.name] = harmful["outcome"]
    outcomes[KeywordJudge.name] = _outcomes(KeywordJudge(), harmful, None, False)
    for judge in further:
        few = harmful.groupby(["defense", "attack"], sort=False).head(FURTHER_REPLIES)
        store = study.folder.path(
            "verdicts", f"{slug(judge.name)}-{key_digest({'judge': judge_identity(judge)})}.jsonl"
        )
        outcomes[judge.name] = pd.Series(_outcomes(judge, few, store, study.progress), index=few.index)
    names = list(outcomes.columns[4:])
    if len(names) < 2:
        return None
    read = tuple(attacks_that(readable, YES))
    comparisons = [
        _against(rows, name, names[0], which, study.settings.seed)
        for name in names[1:]
        for which, rows in ((READ, outcomes[outcomes["attack"].isin(read)]), (ALL, outcomes))
        if rows[name].notna().any()
    ]
    joined = [pd.concat(tables, ignore_index=True) for tables in zip(*comparisons, strict=True)]
    return JudgeTables(names[0], outcomes, read, *joined)


def further_judges(name: str, backend: str = "local", model: str = "") -> list[Judge]:
    """The judge that the arguments of `load_judge` name, if any is named."""
    return [load_judge(name, backend, model)] if name else []


def reply_query(record: dict[str, Any]) -> Query:
    """The query behind a row of replies, as far as a judge reads it: text, prefill, label and meta."""
    meta = json.loads(record["meta"])
    return Query.from_text(record["prompt"], id=record["query_id"], prefill=record["prefill"] or "", meta=meta)


def judge_data(tables: JudgeTables) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """What `plots.plot_judges` draws, of the first judge: counts, confusion, reference."""
    judge, which = tables.first_judge
    counts = tables.counts[(tables.counts["judge"] == judge) & (tables.counts["defense"] != ALL)]
    confusion = tables.confusion[(tables.confusion["judge"] == judge) & (tables.confusion["attacks"] == which)]
    return counts, confusion, tables.reference


def judge_rows(study: Study, tables: JudgeTables | None) -> list[dict[str, Any]]:
    """The judges' values in the result schema; `metric` names the judge. Nothing where there is but one judge."""
    if tables is None:
        return []
    shared: dict[str, Any] = {"model": study.settings.model, "seed": study.settings.seed}
    rows = [
        value_row(
            **shared, defense=ALL, attack=row.attacks, surface="all", label="harmful",
            metric=f"{row.measure}:{row.judge}~{tables.reference}", n=row.n,
            **Estimate(row.value, row.low, row.high).widened()._asdict(),
        )
        for row in tables.measures.itertuples()
    ]  # fmt: skip
    return rows + [
        value_row(
            **shared, defense=row.defense, attack=row.attack, surface="all", label="harmful",
            metric=f"success_excess:{row.judge}~{tables.reference}", n=row.n, value=row.excess, low=row.low,
            high=row.high,
        )
        for row in tables.counts.itertuples()
    ]  # fmt: skip


def _outcomes(judge: Judge, replies: pd.DataFrame, store: Path | None, progress: bool) -> list[str]:
    queries = [reply_query(record) for record in replies.to_dict("records")]
    verdicts = judge_all(judge, queries, replies["reply"].tolist(), store, progress=progress)
    return [verdict.outcome for verdict in verdicts]


def _against(
    outcomes: pd.DataFrame, judge: str, reference: str, which: str, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Measures, confusion and counts of one judge against the reference (see `JudgeTables`)."""
    both = outcomes[outcomes[judge].notna()].reset_index(drop=True)
    shared: dict[str, Any] = {"clusters": both["topic"].tolist(), "seed": seed}
    occurs = (both[[judge, reference]] == COMPLIED).any(axis=None)
    success = agreement(both, judge, [reference], positive=(COMPLIED,) if occurs else (), **shared)
    # All outcomes, for the confusion table alone: no measure of it is looked at.
    whole = agreement(both, judge, [reference], resamples=1, **shared)
    confusion = whole.confusion.rename(columns={"human": "reference", "judge": "judged"})
    groups = [((ALL, which), both), *(both.groupby(["defense", "attack"], sort=False) if which == ALL else ())]
    counts = [
        {"judge": judge, "defense": defense, "attack": attack, **_count(cell, judge, reference, seed)}
        for (defense, attack), cell in groups
        if len(_decided(cell, judge, reference))
    ]
    where = {"judge": judge, "attacks": which}
    return success.measures.drop(columns="raters").assign(**where), confusion.assign(**where), pd.DataFrame(counts)


def _count(outcomes: pd.DataFrame, judge: str, reference: str, seed: int) -> dict[str, Any]:
    decided = _decided(outcomes, judge, reference)
    judged, actual = (decided[name].to_numpy() == COMPLIED for name in (judge, reference))
    excess, low, high = mean_difference(judged, actual, decided["topic"].tolist(), seed, outcomes=True)
    return {
        "n": len(decided),
        "undecided": len(outcomes) - len(decided),
        "success": float(judged.mean()),
        "reference": float(actual.mean()),
        "excess": excess,
        "low": low,
        "high": high,
    }


def _decided(outcomes: pd.DataFrame, judge: str, reference: str) -> pd.DataFrame:
    return outcomes[(outcomes[judge] != UNDECIDED) & (outcomes[reference] != UNDECIDED)]
