"""`Benchmark`: what is known of one public set, as a frozen record; how its rows become queries is part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from casa_mech.errors import InputError
from casa_mech.queries.query import Label
from casa_mech.queries.tables import cell, read_records

Record = Mapping[str, Any]
Modality = Literal["text", "image", "audio"]
WHOLE = ""
"""The key of the one split of a set that has none."""


@dataclass(frozen=True)
class File:
    """Where a record comes from: its file (None: the hub), the split, and the record's number from 1."""

    path: Path | None
    split: str
    number: int


@dataclass(frozen=True)
class Row:
    """One row before it is a query.

    text: what the user says. label, meta: as in `Query`. key: what its id ends in ("": the number in its file).
    media: the picture's or clip's path, relative to one of the benchmark's `media` folders.
    """

    text: str
    label: Label
    meta: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    media: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One public set of queries.

    name: as in `read_queries`. summary: one line. modality: of its rendered queries. label: of its rows; None when they
    differ. rows: how many its publishers state, for the whole and for splits. licence, origin: as published; where to
    get it. files: for each split the file names to look for, the first that is found (a pattern such as
    "processed_questions/*.json" stands for all that match). columns: those a record must have. aliases: names that the
    hub's copies give them. row: a record as a `Row`. select: splits that are
    chosen by row. media: folders of pictures and clips, relative to the table's. remote: addresses that `datasets`
    reads, by split. family: the first half of its ids; sets that render the same rows share it.
    """

    name: str
    summary: str
    label: Label | None
    rows: int
    licence: str
    origin: str
    files: Mapping[str, tuple[str, ...]]
    row: Callable[[Record, File], Row]
    modality: Modality = "text"
    columns: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    split_rows: Mapping[str, int] = field(default_factory=dict)
    select: Mapping[str, Callable[[Row], bool]] = field(default_factory=dict)
    media: tuple[str, ...] = ()
    remote: Mapping[str, str] = field(default_factory=dict)
    records: Callable[[Path], Sequence[Record]] = read_records
    family: str = ""

    @property
    def splits(self) -> tuple[str, ...]:
        """The names that `split` may have; the empty tuple when there are none."""
        return (*(split for split in self.files if split != WHOLE), *self.select)

    @property
    def id_prefix(self) -> str:
        """What the ids of its queries begin with."""
        return self.family or self.name

    def check_split(self, split: str | None) -> None:
        """InputError, listing the splits, unless `split` is None or one of them."""
        if split is not None and split not in self.splits:
            there = ", ".join(self.splits) if self.splits else "none"
            raise InputError(f"benchmark '{self.name}' has no split '{split}'; it has {there}")

    def check_columns(self, record: Record, where: str) -> None:
        """InputError, naming the file and its columns, unless the record has all that this set needs."""
        missing = [column for column in self.columns if column not in record]
        if missing:
            raise InputError(
                f"{where}: no column '{missing[0]}', which {self.name} has; it has {', '.join(map(str, record))}; "
                f"get it anew from {self.origin}"
            )

    def renamed(self, record: Record) -> Record:
        """`record` with the public column names in the place of the hub's."""
        renamed = dict(record)
        for name, public in self.aliases.items():
            if public not in renamed and name in renamed:
                renamed[public] = renamed.pop(name)
        return renamed


def plain_row(
    prompt: str, label: Label, *, compliance: str = "", reference: str = "", context: str = "", **meta: str
) -> Callable[[Record, File], Row]:
    """The `row` of a table with a prompt a line.

    Args:
        prompt: its column. label: of every row.
        compliance, reference: columns of an affirmative opening (a prefill) and of an answer, if there are any.
        context: column of a text that goes before the prompt, where a row has one.
        meta: key of `Query.meta` -> column.
    """

    def row(record: Record, file: File) -> Row:
        text = cell(record.get(prompt))
        known = known_meta(record, compliance=compliance, reference=reference, context=context, **meta)
        if "context" in known:
            return Row(f"{known['context']}\n\n{text}", label, {**known, "request": text})
        return Row(text, label, known)

    return row


def known_meta(record: Record, **columns: str) -> dict[str, str]:
    """The record's cells that are not empty, under their `Query.meta` keys; an empty column name is passed over."""
    return {key: text for key, column in columns.items() if column and (text := cell(record.get(column)))}


def has(key: str, *values: str) -> Callable[[Row], bool]:
    """A `select` entry: the rows whose meta has one of `values` under `key`."""
    return lambda row: row.meta.get(key) in values
