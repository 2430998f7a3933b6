"""Notebook 12: the audit of the study's gate, in its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pandas as pd

from casa_mech.audit import AuditResult, audit
from casa_mech.audit.names import COLUMNS
from casa_mech.compare.sets import LABELS, WorldSets
from casa_mech.evaluation.evaluate import CASA, judge_for
from casa_mech.evaluation.sources import check_labels, load_sources, query_sources, under_attack
from casa_mech.identity import queries_digest
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.results import value_row
from casa_mech.omni import GenerationSettings
from casa_mech.plan.world_data import BENIGN_ATTACKS
from casa_mech.queries import Query
from casa_mech.study import Study
from casa_mech.study.settings import ProfileName

ATTACKS = (*BENIGN_ATTACKS, "prefill-12")
"""Attacks of the micro-world that the gate is audited on: those with benign requests, and the longest prefill."""
PAIRS: Mapping[ProfileName, int] = MappingProxyType({"smoke": 24, "default": 100, "full": 300})
"""Harmful requests under each attack, with as many benign counterparts; each is answered five times."""
OWN_QUERIES = "own queries"
"""The attack of queries from a file that names none."""


def token_audit(study: Study, queries: str = "", n: int = 0) -> AuditResult:
    """The audit of the study's gate, made on the first call and then found in the run folder.

    Args:
        study: whose gate, model and sizes are used.
        queries: labelled tables, attack's folders or benchmarks, with commas between; empty: pairs of the micro-world
            in held-out phrasings under `ATTACKS`, or the columns of another plan's attack table.
        n: pairs under each attack; 0: the profile's of `PAIRS`, of another plan its `n_eval`.

    Raises:
        InputError: queries that cannot be read, or without labels.
    """
    pairs = PAIRS[study.settings.profile] if study.data.micro_world else study.sizes.n_eval
    audited = _queries(study, queries, n or pairs)
    sizes, seed = study.sizes, study.settings.seed
    key = {"queries": queries_digest(audited), "tokens": sizes.max_new_tokens}

    def build() -> pd.DataFrame:
        settings = GenerationSettings(max_new_tokens=sizes.max_new_tokens, batch_size=sizes.batch_size)
        judge = judge_for(audited) if queries else study.judge()
        progress = study.progress
        return audit(study.casa(), audited, judge, settings=settings, seed=seed, progress=progress).replies

    replies = study.gate_table("token-audit", key, build)
    return AuditResult(replies.reindex(columns=list(COLUMNS)), study.title, CASA, seed)


def _queries(study: Study, queries: str, n: int) -> list[Query]:
    if not queries and not study.data.micro_world:
        columns = [(attack, label) for attack in study.benign_attacks for label in LABELS]
        return [query for attack, label in columns for query in study.queries(attack, label, n)]
    if not queries:
        sets = WorldSets(ATTACKS, n)
        return [query for cell in sets.cells() for query in sets.queries(cell, study.settings.seed, study.omni())]
    names = [name.strip() for name in queries.split(",")]
    sources = load_sources(query_sources(names, [], {}, seed=study.settings.seed))
    listed = [query for source in sources for query in source.queries]
    own = [under_attack(query, query.meta.get("attack", OWN_QUERIES)) for query in listed]
    check_labels(own)
    return own


def reading_table(summary: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A table to read: cells with their n down, the names of `measure` across, `value [low, high]` in percent."""
    rows = summary[summary["measure"] == measure]
    cells = [Estimate.of(row).percent(".0f") for row in rows.to_dict("records")]
    return rows.assign(cell=cells).pivot_table(
        index=["attack", "surface", "label", "n"], columns="name", values="cell", aggfunc="first", sort=False
    )


def audit_rows(study: Study, summary: pd.DataFrame) -> list[dict[str, Any]]:
    """The numbers of `AuditResult.summary` in the result schema; `metric` holds measure and name."""
    return [
        value_row(
            model=study.settings.model, defense=CASA, attack=row["attack"], surface=row["surface"], label=row["label"],
            metric=f"{row['measure']}: {row['name']}", seed=study.settings.seed, n=row["n"],
            **Estimate.of(row)._asdict(),
        )
        for row in summary.to_dict("records")
    ]  # fmt: skip
