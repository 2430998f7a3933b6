"""`Benchmark`: one public set as a frozen record: its files, licence and size, and how its rows become queries."""

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
    """Where a record comes from."""

    path: Path | None
    """Its file; None: the hub."""
    split: str
    """The split that the file is of."""
    number: int
    """The record's, from 1."""


@dataclass(frozen=True)
class Row:
    """One row before it is a query."""

    text: str
    """The user's words."""
    label: Label
    """As in `Query`, like `meta`."""
    meta: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    """The end of its id; "": the number in its file."""
    media: str = ""
    """The picture's or clip's path, relative to one of the benchmark's `media` folders."""


@dataclass(frozen=True)
class Benchmark:
    """One public set of queries."""

    name: str
    """As in `read_queries`."""
    summary: str
    """One line."""
    label: Label | None
    """Of its rows; None when they differ."""
    rows: int
    """How many its publishers state."""
    licence: str
    """As published."""
    origin: str
    """Where to get it."""
    files: Mapping[str, tuple[str, ...]]
    """For each split the file names to look for, of which the first that is there is read; a pattern such as
    "processed_questions/*.json" stands for all that match."""
    row: Callable[[Record, File], Row]
    """A record as a `Row`."""
    modality: Modality = "text"
    """Of its rendered queries."""
    columns: tuple[str, ...] = ()
    """Those that a record must have."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that the hub's copies give its columns, and the public ones."""
    split_rows: Mapping[str, int] = field(default_factory=dict)
    """How many rows its publishers state for a split."""
    select: Mapping[str, Callable[[Row], bool]] = field(default_factory=dict)
    """Splits that are chosen by row."""
    media: tuple[str, ...] = ()
    """Folders of pictures and clips, relative to the table's."""
    remote: Mapping[str, str] = field(default_factory=dict)
    """Addresses that `datasets` reads, by split."""
    records: Callable[[Path], Sequence[Record]] = read_records
    """The records of one of its files."""
    family: str = ""
    """The first half of its ids; sets that render the same rows share it. "": its name."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The names that `split` may have; the empty tuple when there are none."""
        return (*(split for split in self.files if split != WHOLE), *self.select)

    @property
    def id_prefix(self) -> str:
        """The beginning of its queries' ids."""
        return self.family or self.name

    def check_split(self, split: str | None) -> None:
        """InputError, listing the splits, unless `split` is None or one of them."""
        if split is not None and split not in self.splits:
            splits = ", ".join(self.splits) or "none"
            raise InputError(f"benchmark '{self.name}' has no split '{split}'; it has {splits}")

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
        row_meta = meta_of(record, compliance=compliance, reference=reference, context=context, **meta)
        if "context" in row_meta:
            return Row(f"{row_meta['context']}\n\n{text}", label, {**row_meta, "request": text})
        return Row(text, label, row_meta)

    return row


def meta_of(record: Record, **columns: str) -> dict[str, str]:
    """The record's cells that are not empty, under their `Query.meta` keys; an empty column name is passed over."""
    return {key: text for key, column in columns.items() if column and (text := cell(record.get(column)))}


def has(key: str, *values: str) -> Callable[[Row], bool]:
    """A `select` entry: the rows whose meta has one of `values` under `key`."""
    return lambda row: row.meta.get(key) in values
