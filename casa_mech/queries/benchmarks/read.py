"""`read_queries` and `read_benchmark`: a public set by name, as queries."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks.benchmark import WHOLE, Benchmark, File, Record, Row
from casa_mech.queries.benchmarks.locate import (
    data_folder,
    files_to_read,
    find_files,
    from_hub,
    of_file,
    where_to_get,
)
from casa_mech.queries.benchmarks.registry import BENCHMARKS, benchmark_named
from casa_mech.queries.draws import sample
from casa_mech.queries.files import QuerySource, read_source
from casa_mech.queries.loaded import LoadedQueries
from casa_mech.queries.minors import concerns_minors
from casa_mech.queries.query import AudioPart, ImagePart, Part, Query, TextPart
from casa_mech.queries.tables import placed

TABLE = "table"
MissingMedia = Literal["error", "text"]
_SCREENED_META = ("request", "compliance", "instruction", "key_phrase", "changed_question", "context", "behavior")
_TABLE_FIELDS = ("column", "label", "label_column", "image_column", "audio_column", "text", "other_labels")
_CATEGORIES = ("category", "policy", "harm", "specific_harm")


def read_queries(
    name: str,
    path: Path | str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    *,
    drop_minors: bool = True,
    missing_media: MissingMedia = "error",
    columns: Mapping[str, str] | None = None,
) -> list[Query]:
    """The queries of a public set; the short form of `read_benchmark`, which has the arguments and errors."""
    loaded = read_benchmark(
        name, path, split, limit, seed, drop_minors=drop_minors, missing_media=missing_media, columns=columns
    )
    return list(loaded.queries)


def read_benchmark(
    name: str,
    path: Path | str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    *,
    drop_minors: bool = True,
    missing_media: MissingMedia = "error",
    columns: Mapping[str, str] | None = None,
) -> LoadedQueries:
    """A public set, with the account of what was left out.

    Args:
        name: one of `BENCHMARKS`, or "table" for any table or folder of media (`QuerySource`).
        path: a file or folder in the public format. None: the folder that CASA_MECH_DATA names, else the hub.
        split: one of the set's splits; None: all that there are.
        limit: at most so many queries, drawn by the seed; their order is the file's.
        seed: of the draw.
        drop_minors: leave out rows that mention minors in a sexual or harmful setting.
        missing_media: what to do about a picture that is not there: an error, or the text alone
            (`meta["image"]` keeps the name and `LoadedQueries.without_media` counts).
        columns: for "table" only: fields of `QuerySource` (column, label, label_column, image_column, audio_column,
            text, other_labels).

    Returns:
        The queries. Their ids are `<set>:<row>` (rows from 1, or the set's own numbers); sets that render the same
        rows share ids. `meta["request"]` is the plain request where the text is another one.

    Raises:
        InputError: an unknown set or split, no file (what to download and where to put it), a missing column, an empty
            prompt or a missing picture (with the row), a broken table.
    """
    if name == TABLE:
        return _read_table(path, split, limit, seed, drop_minors, columns or {})
    if columns:
        raise InputError(f"columns are for '{TABLE}'; {name} has columns of its own")
    benchmark = benchmark_named(name)
    benchmark.check_split(split)
    records, sources = _records(benchmark, None if path is None else Path(path), split)
    kept: list[Query] = []
    dropped: list[str] = []
    for query_id, row, file in _rows(benchmark, records, split):
        if drop_minors and _concerns_minors(row):
            dropped.append(query_id)
        else:
            kept.append(_query(benchmark, row, file, query_id, missing_media))
    n = len(kept) + len(dropped)
    if not kept:
        raise InputError(_nothing(benchmark, split, sources, n))
    queries = sample(kept, limit, seed)
    without = sum(query.modalities == {"text"} for query in queries) if benchmark.modality != "text" else 0
    unscreened = sum("audio" in query.modalities and "request" not in query.meta for query in queries)
    return LoadedQueries(benchmark.name, tuple(queries), n, tuple(dropped), without, unscreened, tuple(sources))


def _rows(
    benchmark: Benchmark, records: Iterable[tuple[Record, File]], split: str | None
) -> Iterator[tuple[str, Row, File]]:
    """The rows of the split, each with its query's id."""
    seen: set[str] = set()
    in_split = benchmark.select.get(split) if split is not None else None
    for record, file in records:
        where = f"{file.path or benchmark.remote.get(file.split, benchmark.name)} row {file.number}"
        with placed(where):
            row = benchmark.row(record, file)
        if not row.text:
            raise InputError(f"{where}: empty prompt; fill it or drop the row")
        if in_split is not None and not in_split(row):
            continue
        key = row.key or (f"{file.split}-{file.number}" if file.split != WHOLE else str(file.number))
        query_id = f"{benchmark.id_prefix}:{key}"
        if query_id in seen:
            raise InputError(f"{where}: a second row of the id {query_id}; drop one of them")
        seen.add(query_id)
        yield query_id, row, file


def _records(
    benchmark: Benchmark, path: Path | None, split: str | None
) -> tuple[Iterator[tuple[Record, File]], list[str]]:
    """The records with where each comes from, and the names of the files."""
    folder = data_folder() if path is None else path
    if path is not None and not path.exists():
        raise InputError(f"{benchmark.name}: no file or folder {path}. {where_to_get(benchmark)}")
    if folder is not None:
        if folder.is_file():
            by_split = of_file(benchmark, folder, split)
        else:
            by_split = find_files(benchmark, folder, shared=path is None)
        files = files_to_read(benchmark, by_split, split)
        if files:
            return _from_files(benchmark, files), [str(file) for _, file in files]
    if path is not None:
        raise InputError(f"{path} does not hold {benchmark.name}. {where_to_get(benchmark)}")
    splits = [split] if split in benchmark.files and split is not None else list(benchmark.files)
    loaded = [_numbered(benchmark, from_hub(benchmark, name), None, name) for name in splits]
    return chain.from_iterable(loaded), [benchmark.remote[name] for name in splits]


def _from_files(benchmark: Benchmark, files: Iterable[tuple[str, Path]]) -> Iterator[tuple[Record, File]]:
    for split, path in files:
        yield from _numbered(benchmark, benchmark.records(path), path, split)


def _numbered(
    benchmark: Benchmark, records: Iterable[Record], path: Path | None, split: str
) -> Iterator[tuple[Record, File]]:
    where = str(path or benchmark.remote.get(split, benchmark.name))
    for number, record in enumerate(records, start=1):
        renamed = benchmark.renamed(record)
        benchmark.check_columns(renamed, where if number == 1 else f"{where} row {number}")
        yield renamed, File(path, split, number)


def _query(benchmark: Benchmark, row: Row, file: File, query_id: str, missing_media: MissingMedia) -> Query:
    parts: list[Part] = []
    if row.media:
        media = _media(benchmark, row, file, query_id, missing_media)
        if media is not None:
            parts.append(AudioPart(audio=media) if benchmark.modality == "audio" else ImagePart(image=media))
    parts.append(TextPart(text=row.text))
    meta = {**row.meta, "split": file.split} if file.split != WHOLE else dict(row.meta)
    return Query(id=query_id, parts=tuple(parts), label=row.label, source=benchmark.name, meta=meta)


def _media(benchmark: Benchmark, row: Row, file: File, query_id: str, missing: MissingMedia) -> Path | None:
    folders = [file.path.parent / folder for folder in benchmark.media] if file.path is not None else []
    places = [folder / row.media for folder in folders]
    file_there = next((place for place in places if os.path.isfile(place)), None)
    if file_there is None and missing == "error":
        raise InputError(
            f"{benchmark.name}: {query_id} has no picture {row.media} (looked in {', '.join(benchmark.media)} beside "
            f"{file.path or 'the table'}); get it from {benchmark.origin}, or read the text alone with "
            'missing_media="text"'
        )
    return file_there


def _concerns_minors(row: Row) -> bool:
    texts = [row.text, *(row.meta[key] for key in _SCREENED_META if key in row.meta)]
    categories = " ; ".join(row.meta[key] for key in _CATEGORIES if key in row.meta)
    return concerns_minors([*texts, categories] if row.label == "harmful" else texts, row.label, categories)


def _nothing(benchmark: Benchmark, split: str | None, sources: list[str], n: int) -> str:
    where = f"{benchmark.name} ({', '.join(sources[:3])}{', ...' if len(sources) > 3 else ''})"
    if n:
        return f"{where}: every row mentions minors in a sexual or harmful setting, so none is left"
    hint = " The list of its ids, TinyVersion_ID_List.json, is to lie beside the questions" if split == "tiny" else ""
    return f"{where}: no row{f' of split {split!r}' if split else ''}; get it anew from {benchmark.origin}.{hint}"


def _read_table(
    path: Path | str | None,
    split: str | None,
    limit: int | None,
    seed: int,
    drop_minors: bool,
    columns: Mapping[str, Any],
) -> LoadedQueries:
    if path is None or split is not None:
        raise InputError(f"'{TABLE}' needs a path and has no splits; the named sets are {', '.join(BENCHMARKS)}")
    unknown = [name for name in columns if name not in _TABLE_FIELDS]
    if unknown:
        raise InputError(f"columns has no '{unknown[0]}'; it may have {', '.join(_TABLE_FIELDS)}")
    loaded = read_source(QuerySource(path=Path(path), drop_minors=drop_minors, **columns))
    return replace(loaded, queries=tuple(sample(loaded.queries, limit, seed)))
