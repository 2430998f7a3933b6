"""Another judge on replies that are there already: nothing is generated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import PAIRS, UNLABELLED, VERDICTS, result_rows, verdict_table, write_both
from casa_mech.files import check_folder
from casa_mech.judging import Judge, Verdict, VerdictStore, agreement, judge_all, write_table
from casa_mech.judging.agreement import LEVELS, Level
from casa_mech.judging.http_api import requests_of
from casa_mech.judging.results import RESULT_COLUMNS
from casa_mech.judging.store import stored_tokens
from casa_mech.judging.verdict import request_text
from casa_mech.locks import HOLDER, LOCK, locked
from casa_mech.queries import Query
from casa_mech.queries.labels import label_named
from casa_mech.queries.tables import cell, placed, read_table, undefused

_FILES = {VERDICTS, *(f"{name}.{suffix}" for name in ("verdicts", "results") for suffix in ("parquet", "csv"))}
_DEFAULTS = {"model": "unknown", "defense": "unknown", "attack": "none", "surface": "text", "label": UNLABELLED}


def judge_replies(
    path: Path,
    judge: Judge,
    out: Path,
    *,
    prompt_column: str = "prompt",
    reply_column: str = "reply",
    limit: int | None = None,
    retry_undecided: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Verdicts on stored replies, written with the rates as `verdicts` and `results`, parquet and CSV, into `out`.

    Args:
        path: a table of replies (CSV, JSON, JSONL, parquet), as an evaluation's, or a folder with `replies.parquet`.
            Read where present: `query_id`, `prefill`, `meta`, `topic`, `split`, `safety_token`, `v_s`, and `model`,
            `defense`, `attack`, `surface`, `label` for the rates.
        judge: see `load_judge`.
        out: a new folder, or one of an earlier judgement; its `verdicts.jsonl` is what a stopped run goes on from.
        prompt_column, reply_column: where the requests and the replies are.
        limit: at most so many rows, from the start.
        retry_undecided: whether to ask again where the stored verdict is undecided.
        seed: of the bootstraps.
        progress: whether to draw a bar.

    Returns:
        What was judged, how many verdicts were there already, outcomes, tokens and cost, and the rates.

    Raises:
        InputError: a table that cannot be read, or that lacks a column. RunError: `out` holds other files or is
            in use, or the judge is down; verdicts that were given are kept.
    """
    check_folder(out, [*_FILES, LOCK, HOLDER])
    file = path / "replies.parquet" if path.is_dir() else path
    table = read_table(file).head(limit)
    if file.suffix.lower() in (".csv", ".tsv"):
        table = table.map(undefused)
    queries = _queries(table, path, prompt_column, reply_column)
    replies = [_cell(value, f"{path} row {number}") for number, value in enumerate(table[reply_column], 1)]
    with locked(out):  # two at once would ask, and pay, for every verdict twice
        return _judge(table, queries, replies, judge, out, retry_undecided, seed, progress)


def _judge(
    table: pd.DataFrame,
    queries: Sequence[Query],
    replies: Sequence[str],
    judge: Judge,
    out: Path,
    retry_undecided: bool,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    store = VerdictStore(out / VERDICTS)
    n_stored = len(store)
    verdicts = judge_all(judge, queries, replies, store, retry_undecided=retry_undecided, progress=progress)
    rows = result_rows(_judged(table, queries, verdicts), seed)
    judgement = verdict_table(verdicts)
    write_both(judgement, out / "verdicts")
    for suffix in ("parquet", "csv"):
        write_table(rows, out / f"results.{suffix}")
    shown = [name for name in RESULT_COLUMNS if name not in ("model", "seed")]
    return {
        "judge": judge.name,
        "replies": len(table),
        "asked": len(store) - n_stored,
        "undecided": sum(not verdict.decided for verdict in verdicts),
        "outcomes": {str(name): int(n) for name, n in judgement["outcome"].value_counts().items()},
        **stored_tokens(verdicts),
        **requests_of(judge),
        "out": str(out),
        "results": [{name: row[name] for name in shown} for row in rows],
    }


def judge_agreement(
    path: Path,
    judge: str,
    humans: Sequence[str],
    *,
    positive: Sequence[str] = (),
    level: str = "nominal",
    cluster: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """`agreement` of a table's columns, as lists of rows: `measures` and `confusion`.

    Raises:
        InputError: as `agreement`; a table that cannot be read, or a cluster column that it does not have.
    """
    table = read_table(path)
    if cluster and cluster not in table.columns:
        raise InputError(f"{path}: no column {cluster!r}; it has {', '.join(map(str, table.columns))}")
    levels: dict[str, Level] = {name: name for name in LEVELS}
    if level not in levels:
        raise InputError(f"unknown level {level!r}; levels: {', '.join(LEVELS)}")
    agreed = agreement(
        table, judge, humans, positive=positive, level=levels[level], seed=seed,
        clusters=table[cluster].astype(str).tolist() if cluster else None,
    )  # fmt: skip
    return {
        "file": str(path),
        "judge": judge,
        "rows": len(table),
        "undecided": agreed.undecided,
        "measures": agreed.measures.to_dict("records"),
        "confusion": agreed.confusion.to_dict("records"),
    }


def _queries(table: pd.DataFrame, path: Path, prompt_column: str, reply_column: str) -> list[Query]:
    for column in (prompt_column, reply_column):
        if column not in table.columns:
            raise InputError(f"{path}: no column {column!r}; it has {', '.join(map(str, table.columns))}")
    if table.empty:
        raise InputError(f"{path}: holds no replies")
    return [_query(record, number, path, prompt_column) for number, record in enumerate(table.to_dict("records"), 1)]


def _query(record: Mapping[str, Any], number: int, path: Path, prompt_column: str) -> Query:
    """One row's request. InputError, naming the row, for a `meta` that is no JSON object or a row with no request."""
    try:
        meta = json.loads(_text(record.get("meta")) or "{}")
        meta = {str(key): str(value) for key, value in meta.items()}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path} row {number}: the column 'meta' holds no JSON object") from None
    if topic := _text(record.get("topic")):
        meta.setdefault("topic", topic)
    if surface := _text(record.get("surface")):
        meta.setdefault("surface", surface)
    query = Query.from_text(
        _cell(record[prompt_column], f"{path} row {number}"),
        id=_text(record.get("query_id")) or f"{path.name}:{number}",
        label=label_named(_text(record.get("label"))),
        prefill=_text(record.get("prefill")),
        meta=meta,
    )
    if not request_text(query).strip():
        raise InputError(f"{path} row {number}: no request in column {prompt_column!r} for the judge to read")
    return query


def _judged(table: pd.DataFrame, queries: Sequence[Query], verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """The table of replies with the verdicts, as `result_rows` reads it: what it lacks has a default."""
    judged = table.assign(
        query_id=[query.id for query in queries],
        topic=[query.meta.get("topic", "") for query in queries],
        outcome=[verdict.outcome for verdict in verdicts],
        score=pd.array([verdict.score for verdict in verdicts], dtype="Float64").to_numpy(float, na_value=float("nan")),
    )
    # The cells of a CSV are text: an empty one is no number and no token.
    for name in {"v_s", *PAIRS} & set(judged):
        judged[name] = pd.to_numeric(judged[name], errors="coerce")
    if "safety_token" in judged:
        judged["safety_token"] = judged["safety_token"].map(lambda token: _text(token) or None)
    for name, value in _DEFAULTS.items():
        judged[name] = [_text(text) or value for text in judged[name]] if name in judged else value
    judged["label"] = [label_named(text) or text for text in judged["label"]]
    return judged


def _cell(value: object, where: str) -> str:
    """A cell of prompts or replies. InputError for what is no text, or too much."""
    with placed(where):
        cell(value)
    return _text(value)


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)
