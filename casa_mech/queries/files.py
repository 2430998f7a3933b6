"""Queries from a researcher's own files: tables (CSV, TSV, JSON, JSONL, parquet), folders of media, single media."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from casa_mech.errors import InputError
from casa_mech.queries.index import is_index, read_index
from casa_mech.queries.loaded import LoadedQueries
from casa_mech.queries.minors import concerns_minors
from casa_mech.queries.query import AudioPart, Example, ImagePart, Label, Part, Query, TextPart
from casa_mech.queries.tables import TABLE_SUFFIXES, cell, read_records, read_table

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff")


class QuerySource(BaseModel):
    """Where queries come from, and which columns hold what.

    path: a table, a folder of pictures or clips (one query a file), or one picture or clip.
    column: the table's column of prompts; needless when there is a media column, or for media.
    label: what all queries of this source are; None when unknown.
    image_column, audio_column: columns of paths, relative to the table's folder.
    text: a prompt to go with each picture or clip that has none of its own.
    limit: at most so many queries, from the start.
    drop_minors: leave out rows that mention minors in a sexual or harmful setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    column: str | None = None
    label: Label | None = None
    image_column: str | None = None
    audio_column: str | None = None
    text: str | None = None
    limit: int | None = None
    drop_minors: bool = True

    @property
    def is_table(self) -> bool:
        """Whether the path is a table, so that columns have a meaning."""
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
            there are), an empty prompt (it names the row), a missing media file, or no query at all.
    """
    path = source.path
    if not path.exists():
        raise InputError(f"no file or folder {path}; check the path")
    queries: Iterable[Query]
    if source.is_table and path.is_file():
        rows, queries = _from_table(source)
    elif path.is_dir() and is_index(path):
        found = read_index(path)
        change = {"label": source.label} if source.label else {}
        rows, queries = len(found), (query.model_copy(update=change) for query in found)
    elif path.is_dir():
        files = _media_in(source)
        rows = len(files)
        queries = (_from_media(file, source, f"{path.name}/{file.name}") for file in files)
    elif path.suffix.lower() in IMAGE_SUFFIXES + AUDIO_SUFFIXES:
        rows, queries = 1, [_from_media(path, source, path.name)]
    else:
        raise InputError(
            f"{path}: files of type '{path.suffix or 'no suffix'}' are not read; give a table "
            f"({', '.join(TABLE_SUFFIXES)}), a picture, a clip, or a folder of pictures or clips"
        )
    if not rows:
        raise InputError(f"{path}: holds no rows; give a file with at least one query")
    return _screened(source, rows, queries)


def _screened(source: QuerySource, rows: int, queries: Iterable[Query]) -> LoadedQueries:
    kept: list[Query] = []
    dropped = []
    for query in queries:
        if source.limit is not None and len(kept) >= source.limit:
            break
        if source.drop_minors and concerns_minors([query.text], query.label):
            dropped.append(query.id)
        else:
            kept.append(query)
    if not kept:
        raise InputError(f"{source.path}: every row mentions minors in a sexual or harmful setting, so none is left")
    unscreened = sum(not query.text for query in kept)
    name = source.path.name
    return LoadedQueries(name, tuple(kept), rows, tuple(dropped), unscreened=unscreened, files=(str(source.path),))


def _media_in(source: QuerySource) -> list[Path]:
    suffixes = IMAGE_SUFFIXES + AUDIO_SUFFIXES
    files = sorted(file for file in source.path.iterdir() if file.is_file() and file.suffix.lower() in suffixes)
    if not files:
        raise InputError(f"{source.path}: no pictures or clips in this folder; it may hold {', '.join(suffixes)}")
    return files


def _from_media(path: Path, source: QuerySource, query_id: str) -> Query:
    part: Part = ImagePart(image=path) if path.suffix.lower() in IMAGE_SUFFIXES else AudioPart(audio=path)
    text = (TextPart(text=source.text),) if source.text else ()
    return Query(id=query_id, parts=(part, *text), label=source.label, source=source.path.name)


def _from_table(source: QuerySource) -> tuple[int, Iterable[Query]]:
    table = read_table(source.path)
    there = ", ".join(map(str, table.columns))
    if source.column is None and source.image_column is None and source.audio_column is None:
        raise InputError(f"{source.path}: say which column holds the prompts (--column); it has {there}")
    for column in (source.column, source.image_column, source.audio_column):
        if column is not None and column not in table.columns:
            raise InputError(f"{source.path}: no column '{column}'; it has {there}")
    records = table.to_dict("records")
    return len(table), (_from_row(source, number, record) for number, record in enumerate(records, start=1))


def _from_row(source: QuerySource, number: int, record: Mapping[Any, object]) -> Query:
    where = f"{source.path} row {number}"
    parts: list[Part] = []
    if source.image_column is not None:
        parts.append(ImagePart(image=_media_path(record[source.image_column], source, where, IMAGE_SUFFIXES)))
    if source.audio_column is not None:
        parts.append(AudioPart(audio=_media_path(record[source.audio_column], source, where, AUDIO_SUFFIXES)))
    text = source.text if source.column is None else _cell_text(record[source.column], where, source.column)
    if text:
        parts.append(TextPart(text=text))
    return Query(id=f"{source.path.name}:{number}", parts=tuple(parts), label=source.label, source=source.path.name)


def _cell_text(value: object, where: str, column: str) -> str:
    text = cell(value)
    if not text:
        raise InputError(f"{where}: empty prompt in column '{column}'; fill it or drop the row")
    return text


def _media_path(value: object, source: QuerySource, where: str, suffixes: tuple[str, ...]) -> Path:
    text = cell(value)
    if not text:
        raise InputError(f"{where}: no file named; fill the cell or drop the row")
    path = source.path.parent / text
    if not path.is_file():
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
    found = []
    for query in queries:
        record = records[int(query.id.rpartition(":")[2]) - 1]
        known = {key: text for key, column in meta.items() if (text := cell(record[column]))}
        found.append(query.model_copy(update={"meta": {**query.meta, **known}}))
    return found


@dataclass(frozen=True)
class LoadedExamples:
    """Examples, and the ids of the rows left out because they mention minors in a sexual or harmful setting."""

    examples: Sequence[Example]
    dropped: tuple[str, ...] = ()


def read_examples(
    path: Path, column: str, reply_column: str, label_column: str, completion_column: str | None = None
) -> LoadedExamples:
    """A training set from a table: prompts, the replies wanted, and labels (harmful or benign), text only.

    A harmful row's cell in `completion_column`, if there is one, becomes `meta["compliance"]`: the harmful completion
    that circuit breakers are trained on.

    Raises:
        InputError: as `read_source`; also an empty reply, or a label that is neither; the message names the row.
    """
    queries = read_files(QuerySource(path=path, column=column, drop_minors=False))
    examples = []
    dropped = []
    for number, (query, record) in enumerate(zip(queries, read_records(path), strict=True), start=1):
        for name in (reply_column, label_column, completion_column):
            if name is not None and name not in record:
                raise InputError(f"{path}: no column '{name}'; it has {', '.join(map(str, record))}")
        label = record[label_column]
        if label not in ("harmful", "benign"):
            raise InputError(f"{path} row {number}: label {label!r} in column '{label_column}'; use harmful or benign")
        text = _cell_text(record[reply_column], f"{path} row {number}", reply_column)
        fields: dict[str, Any] = {"label": label}
        if completion_column is not None and label == "harmful":
            completion = _cell_text(record[completion_column], f"{path} row {number}", completion_column)
            fields["meta"] = {**query.meta, "compliance": completion}
        if concerns_minors([query.text, text, *fields.get("meta", {}).values()], label):
            dropped.append(query.id)
        else:
            examples.append(Example(query=query.model_copy(update=fields), reply=text))
    if not examples:
        raise InputError(f"{path}: every row mentions minors in a sexual or harmful setting, so none is left")
    return LoadedExamples(examples, tuple(dropped))
