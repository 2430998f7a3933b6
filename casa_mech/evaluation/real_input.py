"""`casa-mech evaluate`: a researcher's own files and public sets through the model and its gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from casa_mech.defenses import load_defense
from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import (
    CASA,
    PARTS,
    PRETRAINED,
    VERDICTS,
    Evaluation,
    check_media,
    evaluate,
    save_evaluation,
)
from casa_mech.files import check_folder
from casa_mech.identity import file_sha256
from casa_mech.judging import MicroWorldJudge
from casa_mech.judging.http_api import requests_of
from casa_mech.omni import GenerationSettings, load_omni
from casa_mech.queries import Query
from casa_mech.queries.benchmarks import BENCHMARKS, BenchmarkSource, chosen_source, read_chosen
from casa_mech.queries.files import QuerySource

if TYPE_CHECKING:
    from casa_mech.judging import Judge

NONE = "-"
_TABLES = {f"{name}.{suffix}" for name in ("replies", "verdicts", "results") for suffix in ("parquet", "csv")}
_STUDY_NAMES = {"none": PRETRAINED, "casa": CASA}
"""Names in the tables where no defence was asked for by name: those of the study's."""
_RESULTS = {*_TABLES, PARTS, VERDICTS}


@dataclass(frozen=True)
class SystemUnderTest:
    """The system under test.

    model, device, dtype: as for `load_omni`. gate: folder of a trained gate or other defence, or None. defense: its
    name; default, what the folder holds, or none. safety_prompt, options: as for `load_defense`.
    """

    model: str = "organism"
    gate: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    defense: str | None = None
    safety_prompt: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def query_sources(
    queries: Sequence[str | Path],
    labels: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    text: str | None = None,
    limit: int | None = None,
    *,
    data: Path | None = None,
    seed: int = 0,
) -> list[QuerySource | BenchmarkSource]:
    """The sources that the command line's repeated options describe.

    Each option is given once for all, or once each in the order of `queries`; `-` stands for none. Column options may
    leave out what is no table, and labels the public sets, whose rows carry their own.

    Args:
        queries: paths, or public sets as `name` or `name:split`; a path that exists wins over a name.
        labels, columns: their values; the columns by the name of their field.
        text, limit: as for `QuerySource`.
        data, seed: as for `BenchmarkSource`.

    Raises:
        InputError: another number of values, what is neither a path nor a set, a label that is neither harmful nor
            benign, or one for a set that is labelled otherwise.
    """
    found = [chosen_source(str(entry), data, limit, seed, text=text) for entry in queries]
    files = [place for place, source in enumerate(found) if isinstance(source, QuerySource)]
    tables = [place for place in files if cast(QuerySource, found[place]).is_table]
    fields: dict[int, dict[str, str | None]] = {place: {} for place in range(len(found))}
    for name, values in {"label": labels, **columns}.items():
        for place, value in _spread(name, values, len(found), files if name == "label" else tables).items():
            fields[place][name] = value if value != NONE else None if name == "label" else ""
    if len(labels) == 1 and not files:
        fields[0]["label"] = labels[0]
    return [_with_fields(source, fields[place], place in tables) for place, source in enumerate(found)]


def _with_fields(
    source: QuerySource | BenchmarkSource, fields: Mapping[str, str | None], table: bool
) -> QuerySource | BenchmarkSource:
    label = fields.get("label")
    if label not in (None, "harmful", "benign"):
        raise InputError(f"--label {label}: use harmful, benign or {NONE}")
    if isinstance(source, QuerySource):
        return source.model_copy(update=dict(fields) if table else {"label": label})
    if label not in (None, BENCHMARKS[source.name].label):
        raise InputError(f"--label {label}: the rows of {source.name} have labels of their own; give {NONE} for it")
    return source


def evaluate_files(
    sources: Sequence[QuerySource | BenchmarkSource],
    system: SystemUnderTest,
    *,
    settings: GenerationSettings,
    attack: str = "none",
    out: Path | None = None,
    judge: Judge | None = None,
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Read, answer, judge and write; every row gets a reply, and with a gate a safety token and a v_s.

    Args:
        sources: what to read; all are checked before the model is loaded.
        system: the model and its gate.
        settings: how replies are generated.
        attack: its name in the tables.
        out: folder for the tables; replies and verdicts are kept there while the run is on, and the same call after a
            stop goes on from them. None: nothing is written.
        judge: default `judge_for` the queries.
        note: told the warnings, one line each.

    Returns:
        What was evaluated, the share of unknown words, the rates, and where the tables are.

    Raises:
        InputError: a source or a row that cannot be used. RunError: `out` cannot be written or holds other files,
            or the judge is down; what was finished is kept in `out`.
    """
    tested = _defense_name(system)
    queries, dropped = _checked(sources, attack, out, judge, note)
    omni = load_omni(system.model, device=system.device, dtype=system.dtype)
    unknown = omni.unknown_share([query.text for query in queries if query.text])
    if unknown > 0 and omni.speaks_micro_world:
        note(
            f"warning: {unknown:.0%} of the words are unknown to {system.model}, which speaks a micro-world's English "
            "only: replies, v_s and rates say nothing about these files beyond that they can be run"
        )
    shared: dict[str, Any] = {"settings": settings, "seed": settings.seed, "progress": True, "store": out}
    how: dict[str, Any] = {"safety_prompt": system.safety_prompt, "path": system.gate, **system.options}
    with load_defense(tested, omni, **how) as defense:
        name = None if system.defense or system.safety_prompt else _STUDY_NAMES.get(tested)
        found = evaluate(omni, defense, queries, judge, defense=name, identity=_identity(tested, system), **shared)
    if out is not None:
        save_evaluation(found, out)
    return {
        "model": system.model,
        "gate": str(system.gate) if system.gate else None,
        "queries": len(found.replies),
        "dropped_minors": dropped,
        "unknown_words": round(unknown, 4),
        "out": str(out) if out else None,
        **_summary(found),
        **(requests_of(judge) if judge else {}),
    }


def _checked(
    sources: Sequence[QuerySource | BenchmarkSource],
    attack: str,
    out: Path | None,
    judge: Judge | None,
    note: Callable[[str], None],
) -> tuple[list[Query], int]:
    """All queries, and how many were left out; whatever can be found wrong before the model is loaded is."""
    readings = [read_chosen(source) for source in sources]
    for reading in readings:
        if reading.dropped:
            note(f"{reading.name}: left out {len(reading.dropped)} rows that mention minors in a harmful setting")
    queries = [_named(query, attack) for reading in readings for query in reading.queries]
    if out is not None:
        check_target(out)
    check_media(queries)
    if isinstance(judge, MicroWorldJudge):
        for query in queries:
            judge.judge(query, "")  # one that it cannot read is said now, not after hours of generation
    return queries, sum(len(reading.dropped) for reading in readings)


def _summary(found: Evaluation) -> dict[str, Any]:
    """Defence, judge, and the rates by source and in all."""
    by_source = found.replies.groupby(["source", "label", "surface"], sort=False).agg(
        n=("reply", "size"), flagged=("safety_token", lambda tokens: float((tokens == "unsafe").mean())),
        mean_v_s=("v_s", "mean"), refused=("outcome", lambda outcome: float((outcome == "refused").mean())),
        undecided=("outcome", lambda outcome: int((outcome == "undecided").sum())),
    )  # fmt: skip
    shown = ("label", "surface", "metric", "n", "value", "low", "high")
    rates = [{name: row[name] for name in shown} for row in found.rows]
    named = {name: str(found.replies[name].iloc[0]) for name in ("defense", "judge")}
    return {**named, "sources": by_source.reset_index().to_dict("records"), "results": rates}


def check_target(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier evaluation.

    Raises:
        RunError: the folder holds other files, or is a file.
    """
    check_folder(out, _RESULTS)


def _named(query: Query, attack: str) -> Query:
    """The query under the attack's name, unless nothing was named and it knows its own (an index does)."""
    if attack == "none" and "attack" in query.meta:
        return query
    return query.model_copy(update={"meta": {**query.meta, "attack": attack}})


def _defense_name(system: SystemUnderTest) -> str:
    """The defence to test, checked as far as that goes without the model."""
    from casa_mech.defenses.registry import check_defense
    from casa_mech.defenses.trained import saved_as

    name = system.defense or (saved_as(system.gate) if system.gate else "none")
    check_defense(name, system.gate, system.options)
    return name


def _identity(tested: str, system: SystemUnderTest) -> dict[str, Any]:
    """What the defence's replies depend on, for the replies that are kept: how it was made, and from which files."""
    files = sorted(path for path in system.gate.rglob("*") if path.is_file()) if system.gate else []
    return {
        "defense": tested,
        "safety_prompt": system.safety_prompt,
        "options": json.loads(json.dumps(dict(system.options), default=str, sort_keys=True)),
        "files": [[path.name, file_sha256(path)] for path in files],
    }


def _spread(name: str, values: Sequence[str], n: int, takers: Sequence[int]) -> dict[int, str]:
    """The option's values by place among the `n` sources; `takers` are those it has a meaning for."""
    if len(values) == 1:
        return dict.fromkeys(takers, values[0])
    if len(values) == n:
        return dict(enumerate(values))
    if values and len(values) != len(takers):
        option = "--" + name.replace("_", "-")
        raise InputError(
            f"{option} is given {len(values)} times for {len(takers)} files: give it once, or once for each --queries "
            f"in their order ({NONE} for none)"
        )
    return dict(zip(takers, values, strict=False))
