"""The labelled queries that a probe is trained on, from texts, queries, tables in memory or files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from casa_mech.errors import InputError
from casa_mech.queries import Label, Prompt, Query, QuerySource, as_queries, read_source
from casa_mech.queries.files import LABEL as LABEL_COLUMN
from casa_mech.queries.files import LIST_SUFFIX, PROMPT, with_columns
from casa_mech.queries.labels import label_of
from casa_mech.queries.tables import TABLE_SUFFIXES, cell, read_records

Prompts: TypeAlias = Sequence[Prompt] | pd.DataFrame | str | Path
"""Texts or queries, a table in memory, or a file (a table, or a `.txt` with one prompt a line)."""
META = ("topic", "category")
"""Columns of a table that go into a query's meta: a topic's prompts are held out together."""


def labelled_queries(
    harmful: Prompts | None,
    benign: Prompts | None,
    data: Prompts | None,
    column: str | None = None,
    label_column: str | None = None,
) -> list[Query]:
    """All prompts as labelled queries: `harmful`, then `benign`, then `data`, whose rows have labels of their own.

    Args:
        harmful, benign: prompts of one class.
        data: prompts of both, queries with labels or a table with a column of them.
        column: of a table's prompts; None: `prompt`.
        label_column: of the labels of `data`; None: `label`.

    Raises:
        InputError: nothing of a class, a prompt that is none, a missing column, or a row without a label.
    """
    if (harmful is None) != (benign is None) or (harmful is None and data is None):
        raise InputError("a probe needs both classes: give harmful=[...] and benign=[...], or data= with labels")
    queries: list[Query] = []
    sides: tuple[tuple[str, Prompts | None, Label], ...] = (
        ("harmful", harmful, "harmful"), ("benign", benign, "benign"),
    )  # fmt: skip
    for name, prompts, label in sides:
        if prompts is not None:
            queries += _queries(prompts, name, label, column, "")
    if data is not None:
        rows = _queries(data, "data", None, column, label_column)
        unlabelled = next((query.id for query in rows if query.label is None), None)
        if unlabelled is not None:
            raise InputError(
                f"`data`: query {unlabelled} has no label; give label_column=, or texts as harmful=/benign="
            )
        queries += rows
    return queries


def _queries(
    prompts: Prompts, name: str, label: Label | None, column: str | None, label_column: str | None
) -> list[Query]:
    if isinstance(prompts, pd.DataFrame):
        queries = _rows(prompts, name, label, column or PROMPT, label_column)
    elif isinstance(prompts, Path) or (isinstance(prompts, str) and _is_file_name(prompts)):
        queries = _file(Path(prompts), label, column, label_column)
    else:
        queries = as_queries(prompts, name, label)
    if not queries:
        raise InputError(f"`{name}` is empty: give a list of prompts")
    return queries


def _is_file_name(text: str) -> bool:
    return Path(text).suffix.lower() in (*TABLE_SUFFIXES, LIST_SUFFIX)


def _file(path: Path, label: Label | None, column: str | None, label_column: str | None) -> list[Query]:
    queries = list(read_source(QuerySource(path=path, column=column, label=label, label_column=label_column)).queries)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        return queries
    there = read_records(path)[0]
    return with_columns(queries, path, {name: name for name in META if name in there})


def _rows(table: pd.DataFrame, name: str, label: Label | None, column: str, label_column: str | None) -> list[Query]:
    there = [str(heading) for heading in table.columns]
    of_labels = LABEL_COLUMN if label_column is None else label_column
    for option, heading in (("column", column), *([("label_column", of_labels)] if label is None else [])):
        if heading not in there:
            raise InputError(f"`{name}`: no column '{heading}'; it has {', '.join(there)} (give {option}=)")
    queries = []
    for number, record in enumerate(table.to_dict("records"), start=1):
        text = cell(record[column])
        if not text:
            raise InputError(f"`{name}` row {number}: empty prompt in column '{column}'; fill it or drop the row")
        meta = {key: value for key in META if key in there and (value := cell(record[key]))}
        own: Any = label if label is not None else record[of_labels]
        try:
            queries.append(Query.from_text(text, label=label_of(own), meta=meta))
        except InputError as error:
            raise InputError(f"`{name}` row {number}: {error}") from None
    return queries
