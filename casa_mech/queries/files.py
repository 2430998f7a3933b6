"""Queries from a researcher's own files: tables, lists of prompts, folders of media, single pictures and clips."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from casa_mech.errors import InputError
from casa_mech.limits import check_text
from casa_mech.queries.index import is_index, read_index
from casa_mech.queries.labels import label_named
from casa_mech.queries.loaded import LoadedQueries
from casa_mech.queries.minors import concerns_minors
from casa_mech.queries.query import AudioPart, Example, ImagePart, Label, Part, Query, TextPart
from casa_mech.queries.tables import TABLE_SUFFIXES, cell, placed, read_lines, read_records, read_table

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff")
LIST_SUFFIX = ".txt"
PROMPT, LABEL = "prompt", "label"
"""The columns of prompts and of labels that are read where a source names none and the table has them."""


class QuerySource(BaseModel):
    """Where queries come from, and which columns hold what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    """A table, a `.txt` file (one prompt a line), a folder of pictures or clips (one query a file), an attack's index,
    or one picture or clip."""
    column: str | None = None
    """The table's column of prompts; None: `prompt`, where it has one; "": none, the media stand alone."""
    label: Label | None = None
    """The label of all queries of this source; None: as its own labels say, or unknown."""
    label_column: str | None = None
    """The table's column of labels (see `label_named`); None: `label`, where it has one; "": none."""
    other_labels: Literal["refuse", "leave_out"] = "refuse"
    """Whether a row that bears another label than `label` is an error, or left out."""
    image_column: str | None = None
    """Column of picture paths, relative to the table's folder; a row with a prompt or clip may lack one."""
    audio_column: str | None = None
    """Column of clip paths, as `image_column`."""
    text: str | None = None
    """A prompt to go with each picture or clip that has none of its own."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many queries, from the start."""
    drop_minors: bool = True
    """Leave out rows that mention minors in a sexual or harmful setting."""

    @property
    def is_table(self) -> bool:
        """True for a table, in which columns have a meaning."""
        return self.path.suffix.lower() in TABLE_SUFFIXES


def read_files(source: QuerySource) -> list[Query]:
    """The source's queries, in order; ids are `<file name>:<row>` (rows from 1, headings not counted) or file names.

    Raises:
        InputError: as `read_source`.
    """
    return list(read_source(source).queries)


def read_source(source: QuerySource) -> LoadedQueries:
    """As `read_files`, with the account of what was left out.

    Raises:
        InputError: no such file, a type that is not read, a broken table, a missing column (the message lists those
            there are), a row without prompt, picture and clip or with a label that cannot be used (it names the row),
            a missing media file, or no query at all.
    """
    path = source.path
    if not path.exists():
        raise InputError(f"no file or folder {path}; check the path")
    if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
        raise InputError(f"{path} is a pipe or device; save it as a file")
    queries: Iterable[Query]
    if source.is_table and path.is_file():
        rows, queries = _from_table(source)
    elif path.suffix.lower() == LIST_SUFFIX and path.is_file():
        lines = read_lines(path)
        rows, queries = len(lines), (_from_line(source, number, line) for number, line in enumerate(lines, start=1))
    elif path.is_dir() and is_index(path):
        indexed = read_index(path)
        rows, queries = len(indexed), (_labelled(source, query, f"query {query.id!r}", "") for query in indexed)
    elif path.is_dir():
        files = _media_in(source)
        rows = len(files)
        queries = (_from_media(file, source, f"{path.name}/{file.name}") for file in files)
    elif path.suffix.lower() in IMAGE_SUFFIXES + AUDIO_SUFFIXES:
        rows, queries = 1, [_from_media(path, source, path.name)]
    else:
        raise InputError(
            f"{path}: files of type '{path.suffix or 'no suffix'}' are not read; give a table "
            f"({', '.join(TABLE_SUFFIXES)}), a {LIST_SUFFIX} file with one prompt a line, a picture, a clip, or a "
            "folder of pictures or clips"
        )
    if not rows:
        raise InputError(f"{path}: holds no rows; give a file with at least one query")
    return _screened(source, rows, queries)


def _screened(source: QuerySource, rows: int, queries: Iterable[Query]) -> LoadedQueries:
    kept: list[Query] = []
    dropped: list[str] = []
    for query in queries:
        if source.label is not None and query.label != source.label:
            continue
        if source.drop_minors and concerns_minors([query.text], query.label):
            dropped.append(query.id)
        else:
            kept.append(query)
        if len(kept) == source.limit:  # what comes after is not even looked at
            break
    if not kept and not dropped:
        raise InputError(f"{source.path}: none of its {rows} rows is labelled {source.label}; give others")
    if not kept:
        raise InputError(f"{source.path}: every row mentions minors in a sexual or harmful setting, so none is left")
    unscreened = sum(not query.text for query in kept)
    name = source.path.name
    return LoadedQueries(name, tuple(kept), rows, tuple(dropped), unscreened=unscreened, files=(str(source.path),))


def _labelled(source: QuerySource, query: Query, where: str, column: str) -> Query:
    """The query with the source's label, where it has none of its own. InputError for another one, unless left out."""
    if source.label is None or query.label == source.label:
        return query
    if query.label is None:
        return query.model_copy(update={"label": source.label})
    if source.other_labels == "leave_out":
        return query
    by = f" in column '{column}'" if column else ""
    hint = " (or --label-column - to leave that column unread)" if column else ""
    raise InputError(
        f"{source.path} {where} is labelled {query.label}{by}, not {source.label}: leave out --label, rows keep their "
        f"own{hint}"
    )


def _media_in(source: QuerySource) -> list[Path]:
    suffixes = IMAGE_SUFFIXES + AUDIO_SUFFIXES
    files = sorted(file for file in source.path.iterdir() if file.is_file() and file.suffix.lower() in suffixes)
    if not files:
        raise InputError(f"{source.path}: no pictures or clips in this folder; it may hold {', '.join(suffixes)}")
    return files


def _from_media(path: Path, source: QuerySource, query_id: str) -> Query:
    check_text(query_id, str(source.path))
    part: Part = ImagePart(image=path) if path.suffix.lower() in IMAGE_SUFFIXES else AudioPart(audio=path)
    text = (TextPart(text=source.text),) if source.text else ()
    return Query(id=query_id, parts=(part, *text), label=source.label, source=source.path.name)


def _from_line(source: QuerySource, number: int, line: str) -> Query:
    name = source.path.name
    return Query.from_text(line.strip(), id=f"{name}:{number}", label=source.label, source=name)


@dataclass(frozen=True)
class _Columns:
    """The columns of a table that hold something; "" where none does."""

    prompt: str
    image: str
    audio: str
    label: str


def _from_table(source: QuerySource) -> tuple[int, Iterable[Query]]:
    table = read_table(source.path)
    columns = _columns(source, [str(name) for name in table.columns])
    records = table.to_dict("records")
    if not columns.image and not columns.audio and not columns.prompt:
        there = ", ".join(map(str, table.columns))
        raise InputError(f"{source.path}: say which column holds the prompts (--column); it has {there}")
    return len(table), (_from_row(source, columns, number, record) for number, record in enumerate(records, start=1))


def _columns(source: QuerySource, there: Sequence[str]) -> _Columns:
    """The columns to read. InputError, listing those there are, for one that is named and missing."""
    for column in (source.column, source.image_column, source.audio_column, source.label_column):
        if column and column not in there:
            raise InputError(f"{source.path}: no column '{column}'; it has {', '.join(there)}")
    prompt, label = (
        (default if default in there else "") if named is None else named
        for named, default in ((source.column, PROMPT), (source.label_column, LABEL))
    )
    return _Columns(prompt, source.image_column or "", source.audio_column or "", label)


def _from_row(source: QuerySource, columns: _Columns, number: int, record: Mapping[Any, object]) -> Query:
    with placed(f"{source.path} row {number}"):
        return _checked_row(source, columns, number, record)


def _checked_row(source: QuerySource, columns: _Columns, number: int, record: Mapping[Any, object]) -> Query:
    where = f"{source.path} row {number}"
    parts: list[Part] = []
    if columns.image and (picture := _media_path(record[columns.image], source, where, IMAGE_SUFFIXES)):
        parts.append(ImagePart(image=picture))
    if columns.audio and (clip := _media_path(record[columns.audio], source, where, AUDIO_SUFFIXES)):
        parts.append(AudioPart(audio=clip))
    text = cell(record[columns.prompt]) if columns.prompt else ""
    if parts and not text:
        text = source.text or ""
    if text:
        parts.append(TextPart(text=text))
    if not parts:
        raise InputError(f"{where}: {_nothing_in(columns)}; fill it or drop the row")
    name = source.path.name
    own = _own_label(source, columns.label, record, where)
    query = Query(id=f"{name}:{number}", parts=tuple(parts), label=own, source=name)
    return _labelled(source, query, f"row {number}", columns.label)


def _nothing_in(columns: _Columns) -> str:
    named = [f"'{name}'" for name in (columns.prompt, columns.image, columns.audio) if name]
    if columns.prompt and len(named) == 1:
        return f"empty prompt in column {named[0]}"
    return f"nothing in {'column' if len(named) == 1 else 'columns'} {', '.join(named)}"


def _own_label(source: QuerySource, column: str, record: Mapping[Any, object], where: str) -> Label | None:
    """The label that the row's cell names. InputError for another word, unless the whole source was given a label."""
    text = cell(record[column]) if column else ""
    label = label_named(text)
    if text and label is None and (source.label is None or source.label_column is not None):
        raise InputError(
            f"{where}: label '{text}' in column '{column}'; write harmful or benign (or unsafe, safe), say with "
            "--label what all rows are, or leave the column unread with --label-column -"
        )
    return label


def _media_path(value: object, source: QuerySource, where: str, suffixes: tuple[str, ...]) -> Path | None:
    text = cell(value)
    if not text:
        return None
    path = source.path.parent / text
    if not os.path.isfile(path):  # unlike pathlib's, also for a name that is too long for any file
        raise InputError(f"{where}: no file {path}; paths are read relative to the table's folder")
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{where}: {path.name} is none of {', '.join(suffixes)}")
    return path


def with_columns(queries: Sequence[Query], path: Path, meta: Mapping[str, str]) -> list[Query]:
    """The queries that `read_source` made of the table `path`, with what `meta` (`Query.meta` key -> column) takes
    from its other columns; empty cells are left out.

    Raises:
        InputError: no table, a broken one, or a column that it does not have.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise InputError(f"{path} is no table: it has no columns to take {', '.join(meta)} from")
    records = read_records(path)
    for column in meta.values():
        if records and column not in records[0]:
            raise InputError(f"{path}: no column '{column}'; it has {', '.join(map(str, records[0]))}")
    extended = []
    for query in queries:
        record = records[int(query.id.rpartition(":")[2]) - 1]
        with placed(f"{path}, {query.id}"):
            cells = {key: text for key, column in meta.items() if (text := cell(record[column]))}
        extended.append(query.model_copy(update={"meta": {**query.meta, **cells}}))
    return extended


@dataclass(frozen=True)
class LoadedExamples:
    """A training set, with the account of what was left out of it."""

    examples: Sequence[Example]
    """Those that are left, in the table's order."""
    dropped: tuple[str, ...] = ()
    """Ids of the rows left out because they mention minors in a sexual or harmful setting."""


def read_examples(
    path: Path, column: str, reply_column: str, label_column: str, completion_column: str | None = None
) -> LoadedExamples:
    """A training set from a table: prompts, the replies wanted, and labels (see `label_named`), text only.

    A harmful row's cell in `completion_column`, if there is one, becomes `meta["compliance"]`: the harmful completion
    that circuit breakers are trained on.

    Raises:
        InputError: as `read_source`; also an empty reply or a row without a label; the message names the row.
    """
    source = QuerySource(path=path, column=column, label_column=label_column, drop_minors=False)
    if not source.is_table and path.is_file():
        raise InputError(f"{path}: a training set needs columns of prompts, replies and labels; give a table")
    queries = read_files(source)
    examples = []
    dropped = []
    for number, (query, record) in enumerate(zip(queries, read_records(path), strict=True), start=1):
        for name in (reply_column, completion_column):
            if name is not None and name not in record:
                raise InputError(f"{path}: no column '{name}'; it has {', '.join(map(str, record))}")
        if query.label is None:
            raise InputError(f"{path} row {number}: no label in column '{label_column}'; write harmful or benign")
        reply = _needed(record[reply_column], f"{path} row {number}", reply_column)
        if completion_column is not None and query.label == "harmful":
            completion = _needed(record[completion_column], f"{path} row {number}", completion_column)
            query = query.model_copy(update={"meta": {**query.meta, "compliance": completion}})
        if concerns_minors([query.text, reply, *query.meta.values()], query.label):
            dropped.append(query.id)
        else:
            examples.append(Example(query=query, reply=reply))
    if not examples:
        raise InputError(f"{path}: every row mentions minors in a sexual or harmful setting, so none is left")
    return LoadedExamples(examples, tuple(dropped))


def _needed(value: object, where: str, column: str) -> str:
    with placed(f"{where}, column '{column}'"):
        text = cell(value)
    if not text:
        raise InputError(f"{where}: empty cell in column '{column}'; fill it or drop the row")
    return text
