"""Queries on disk: a folder with `index.parquet`, one row a query, and the pictures and clips they hold as files.

`casa-mech attack` writes it and `casa-mech evaluate` reads it. Media are named after their content. Writing is done in
parts, so that a stopped one continues; the index itself appears only when everything is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casa_mech.errors import InputError, RunError, reason_of
from casa_mech.files import TEMPORARY, check_folder, storage_error, writing
from casa_mech.identity import SHORT, json_digest, queries_digest
from casa_mech.queries.media_files import store_media
from casa_mech.queries.query import AudioPart, ImagePart, Part, Query, TextPart, Turn

INDEX, MEDIA, PARTS = "index.parquet", "media", "parts"
SCHEMA_VERSION = 1
CHUNK = 200
"""Rows of a part: a stopped writing loses fewer than so many."""
_COLUMNS = ("id", "label", "source", "system", "prefill", "parts", "history", "meta")
_LOCK = ".lock"


def is_index(folder: Path | str) -> bool:
    """True if `folder` holds an index, finished or not."""
    return (Path(folder) / INDEX).is_file() or (Path(folder) / PARTS).is_dir()


def write_index(
    folder: Path | str,
    queries: Sequence[Query],
    make: Callable[[Query], Query | None] | None = None,
    key: str = "",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> int:
    """Write `queries`, each through `make` (an attack) if given, with their media, into `folder`.

    A folder that a stopped call with the same queries and `key` left is continued, a finished one is left as it is.

    Args:
        folder: new, empty, or an index.
        queries: in the order of the rows; their ids must differ.
        make: applied to each query not written yet; None leaves it out.
        key: what `make` depends on, so that other options are not taken for a continuation.
        progress: wraps the parts' numbers, for a bar.

    Returns:
        The number of queries that were made now; 0 when all were there.

    Raises:
        InputError: no query, or none that `make` kept; two of one id; a clip of zero length or a file that is missing
            (with the query's id).
        RunError: the folder holds something else or another index, is in use, or cannot be written to.
    """
    folder = Path(folder)
    ids = [query.id for query in queries]
    if repeated := next((name for name, n in Counter(ids).items() if n > 1), None):
        raise InputError(f"two queries have the id {repeated!r}: give each its own, replies are kept under it")
    if not ids:
        raise InputError(f"no queries to write to {folder}: give at least one")
    sources = [query.source for query in queries]
    digest = json_digest([SCHEMA_VERSION, key, sources, queries_digest(queries)])
    with _locked(folder):
        if _finished(folder, digest):
            return 0
        n_made, parts = 0, []
        for start in progress(range(0, len(queries), CHUNK)):
            path = folder / PARTS / f"{digest[:SHORT]}-{start // CHUNK:06d}.parquet"
            parts.append(path)
            if path.exists():
                continue
            chunk = queries[start : start + CHUNK]
            attacked = (make(query) if make else query for query in chunk)
            _save([_row(query, folder) for query in attacked if query is not None], path, digest)
            n_made += len(chunk)
        _finish(folder, parts, digest)
    return n_made


def read_index(folder: Path | str) -> list[Query]:
    """The queries of an index; media are paths into `folder`.

    Raises:
        InputError: no index, an unfinished or broken one, a row that is no query, or a missing media file; the message
            names the row's id.
    """
    import pyarrow.parquet as parquet

    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        reason = "its writing was stopped: give the same command again" if is_index(folder) else "check the path"
        raise InputError(f"{folder}: no {INDEX} in this folder; {reason}")
    try:
        table = parquet.read_table(path)
        version = int((table.schema.metadata or {}).get(b"schema_version", b"0"))
        rows = table.to_pylist()
    except Exception as error:  # of a broken file pyarrow raises what it likes
        raise InputError(f"{path}: not a readable index ({reason_of(error)}); write it again") from None
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; it was not written by casa-mech attack")
    if version > SCHEMA_VERSION:
        raise InputError(f"{path}: written by a newer casa-mech (layout {version}); update this one")
    return [_query({name: row[name] for name in _COLUMNS}, folder) for row in rows]


def _row(query: Query, folder: Path) -> dict[str, Any]:
    turns = [
        {"role": turn.role, "safety_token": turn.safety_token, "parts": _stored(turn.parts, query.id, folder)}
        for turn in query.history
    ]
    fields = {name: getattr(query, name) for name in ("id", "label", "source", "system", "prefill")}
    content = {"parts": _stored(query.parts, query.id, folder), "history": turns, "meta": dict(query.meta)}
    return fields | {name: json.dumps(value, ensure_ascii=False) for name, value in content.items()}


def _stored(parts: Iterable[Part], query_id: str, folder: Path) -> list[dict[str, str]]:
    return [
        {"kind": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"kind": part.kind, "path": f"{MEDIA}/{store_media(part, folder / MEDIA, query_id)}"}
        for part in parts
    ]


def _query(row: dict[str, Any], folder: Path) -> Query:
    where = f"{folder / INDEX}, query {row['id']!r}"
    try:
        turns = [
            {"role": turn["role"], "safety_token": turn["safety_token"], "parts": _parts(turn["parts"], folder, where)}
            for turn in json.loads(row["history"])
        ]
        content = {"parts": _parts(json.loads(row["parts"]), folder, where), "meta": json.loads(row["meta"])}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_query(where, error) from None
    try:
        return Query(**{**row, **content, "history": tuple(Turn(**turn) for turn in turns)})
    except ValueError as error:
        raise _no_query(where, error) from None


def _no_query(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: not a query ({reason_of(error)}); write the index again")


def _parts(stored: list[dict[str, str]], folder: Path, where: str) -> tuple[Part, ...]:
    parts: list[Part] = []
    for entry in stored:
        if entry["kind"] == "text":
            parts.append(TextPart(text=entry["text"]))
            continue
        path = folder / entry["path"]
        # An index from elsewhere must not make a model read files outside it.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{where}: its file {entry['path']} lies outside the folder; write the index again")
        if not os.path.isfile(path):
            raise InputError(f"{where}: no file {path}; copy the folder again, or write the index again")
        parts.append(ImagePart(image=path) if entry["kind"] == "image" else AudioPart(audio=path))
    return tuple(parts)


def _save(rows: list[dict[str, Any]], path: Path, digest: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    metadata = {"schema_version": str(SCHEMA_VERSION), "key": digest}
    schema = pa.schema([(name, pa.string()) for name in _COLUMNS], metadata=metadata)
    with writing(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)


def _finish(folder: Path, parts: list[Path], digest: str) -> None:
    """Join the parts, and clear what they and earlier tries left."""
    import pyarrow.parquet as parquet

    rows = [row for path in parts for row in parquet.read_table(path).to_pylist()]
    if rows:
        stored = [entry for row in rows for name in ("parts", "history") for entry in json.loads(row[name])]
        used = {Path(entry["path"]).name for entry in _media_of(stored)}
        for path in (folder / MEDIA).glob("*"):
            if path.name not in used:
                path.unlink()
        _save(rows, folder / INDEX, digest)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    if not rows:
        raise InputError(f"{folder}: none of the queries was kept, so there is nothing to write; give others")


def _media_of(stored: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for entry in stored:
        if "role" in entry:
            yield from _media_of(entry["parts"])
        elif entry["kind"] != "text":
            yield entry


def _finished(folder: Path, digest: str) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = folder / INDEX
    if not path.exists():
        return False
    try:
        stored = (parquet.read_schema(path).metadata or {}).get(b"key", b"").decode()
    except (OSError, pa.ArrowException):
        stored = ""
    if stored != digest:
        raise RunError(f"{folder} holds an index of other queries or options: choose a new or empty --out")
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second writer, and clear what a killed one left half-written."""
    from filelock import FileLock, Timeout

    check_folder(folder, (INDEX, MEDIA, PARTS, _LOCK), create=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder} is being written by another process: wait for it, or choose another --out") from None
    except OSError as error:
        raise storage_error(error, folder) from None
    try:
        for left in folder.rglob(f"{TEMPORARY}*"):
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
