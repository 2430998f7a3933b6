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
from casa_mech.reports.benchmarks.tables import YES, common
from casa_mech.study import Study
from casa_mech.study.settings import slug

COMPLIED = "complied"
ALL, READ = "all attacks", "the attacks that it reads"
RESAMPLES = 200
FURTHER_REPLIES = 20
"""Harmful replies of each attack and defence that a judge which costs time or money is asked about."""


@dataclass(frozen=True)
class JudgeTables:
    """Judges held against each other on the same harmful replies.

    reference: the judge that the others are held against, the exact one where there is one. outcomes: `defense, attack,
    topic, query_id`, and a column a judge; NaN where it was not asked. readable: the attacks that the model reads.
    measures: `judge, attacks, measure, n, value, low, high` of "complied" against the rest, `attacks` being `READ` or
    `ALL`. confusion: `judge, attacks, reference, judged, n, share, low, high`. counts: `judge, defense, attack, n,
    undecided, success, reference, excess, low, high`: attack success by either judge, and the difference with an
    interval over topics; `attack` may be `READ` or `ALL`.
    """

    reference: str
    outcomes: pd.DataFrame
    readable: tuple[str, ...]
    measures: pd.DataFrame
    confusion: pd.DataFrame
    counts: pd.DataFrame

    def attacks(self, which: str) -> tuple[str, ...]:
        """The attacks behind `ALL` or `READ`."""
        return self.readable if which == READ else tuple(dict.fromkeys(self.outcomes["attack"]))


def judge_tables(
    study: Study, replies: pd.DataFrame, read: pd.DataFrame, further: Sequence[Judge] = ()
) -> JudgeTables | None:
    """The keyword judge, and any `further` one, against the exact judge; None where there is but one judge.

    Args:
        study: in whose run folder the verdicts of further judges are kept; a stopped judgement goes on from them.
        replies: of `benchmarks.all_replies`; the harmful ones that all attacks share are judged.
        read: of `benchmarks.reading`.
        further: judges as of `load_judge`; each is asked about the first `FURTHER_REPLIES` of each cell.

    Raises:
        RunError: a judge is down; what it said before is kept.
    """
    part = common(study, replies[replies["label"] == "harmful"]).reset_index(drop=True)
    outcomes = part[["defense", "attack", "topic", "query_id"]].copy()
    if set(part["judge"]) == {MicroWorldJudge.name}:
        outcomes[MicroWorldJudge.name] = part["outcome"]
    outcomes[KeywordJudge.name] = _outcomes(KeywordJudge(), part, None, False)
    for judge in further:
        few = part.groupby(["defense", "attack"], sort=False).head(FURTHER_REPLIES)
        store = study.folder.path(
            "verdicts", f"{slug(judge.name)}-{key_digest({'judge': judge_identity(judge)})}.jsonl"
        )
        outcomes[judge.name] = pd.Series(_outcomes(judge, few, store, study.progress), index=few.index)
    names = list(outcomes.columns[4:])
    if len(names) < 2:
        return None
    readable = tuple(str(name) for name in read[read["reads"] == YES]["attack"])
    parts = [
        _against(part, name, names[0], which, study.settings.seed)
        for name in names[1:]
        for which, part in ((READ, outcomes[outcomes["attack"].isin(readable)]), (ALL, outcomes))
        if part[name].notna().any()
    ]
    joined = [pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)]
    return JudgeTables(names[0], outcomes, readable, *joined)


def further_judges(name: str, backend: str = "local", model: str = "") -> list[Judge]:
    """The judge that the arguments of `load_judge` name, if any is named."""
    return [load_judge(name, backend, model)] if name else []


def reply_query(record: dict[str, Any]) -> Query:
    """The query behind a row of replies, as far as a judge reads it: text, prefill, label and meta."""
    meta = json.loads(record["meta"])
    return Query.from_text(record["prompt"], id=record["query_id"], prefill=record["prefill"] or "", meta=meta)


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


def _outcomes(judge: Judge, part: pd.DataFrame, store: Path | None, progress: bool) -> list[str]:
    queries = [reply_query(record) for record in part.to_dict("records")]
    verdicts = judge_all(judge, queries, part["reply"].tolist(), store, progress=progress)
    return [verdict.outcome for verdict in verdicts]


def _against(
    outcomes: pd.DataFrame, judge: str, reference: str, which: str, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    asked = outcomes[outcomes[judge].notna()].reset_index(drop=True)
    shared: dict[str, Any] = {"clusters": asked["topic"].tolist(), "seed": seed}
    given = (asked[[judge, reference]] == COMPLIED).any(axis=None)
    positive = (COMPLIED,) if given else ()
    found = agreement(asked, judge, [reference], positive=positive, resamples=RESAMPLES, **shared)
    # All outcomes, for the confusion table alone: its intervals are Wilson's, no resample is looked at.
    whole = agreement(asked, judge, [reference], resamples=1, **shared)
    confusion = whole.confusion.rename(columns={"human": "reference", "judge": "judged"})
    groups = [((ALL, which), asked), *(asked.groupby(["defense", "attack"], sort=False) if which == ALL else ())]
    counts = [
        {"judge": judge, "defense": defense, "attack": attack, **_count(part, judge, reference, seed)}
        for (defense, attack), part in groups
        if len(_decided(part, judge, reference))
    ]
    where = {"judge": judge, "attacks": which}
    return found.measures.drop(columns="raters").assign(**where), confusion.assign(**where), pd.DataFrame(counts)


def _count(part: pd.DataFrame, judge: str, reference: str, seed: int) -> dict[str, Any]:
    decided = _decided(part, judge, reference)
    said, true = (decided[name].to_numpy() == COMPLIED for name in (judge, reference))
    excess, low, high = mean_difference(said, true, decided["topic"].tolist(), seed, outcomes=True, resamples=RESAMPLES)
    return {
        "n": len(decided),
        "undecided": len(part) - len(decided),
        "success": float(said.mean()),
        "reference": float(true.mean()),
        "excess": excess,
        "low": low,
        "high": high,
    }


def _decided(part: pd.DataFrame, judge: str, reference: str) -> pd.DataFrame:
    return part[(part[judge] != UNDECIDED) & (part[reference] != UNDECIDED)]
