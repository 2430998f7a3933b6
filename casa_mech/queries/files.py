"""Queries from a researcher's own files: tables (CSV, TSV, JSON, JSONL, parquet), folders of media, single media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import BaseModel, ConfigDict

from casa_mech.errors import InputError
from casa_mech.queries.query import AudioPart, Example, ImagePart, Label, Part, Query, TextPart

if TYPE_CHECKING:
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    column: str | None = None
    label: Label | None = None
    image_column: str | None = None
    audio_column: str | None = None
    text: str | None = None
    limit: int | None = None

    @property
    def is_table(self) -> bool:
        """Whether the path is a table, so that columns have a meaning."""
        return self.path.suffix.lower() in TABLE_SUFFIXES


def read_queries(source: QuerySource) -> list[Query]:
    """The source's queries, in order; ids are `<file name>:<row>` (rows from 1, headings not counted) or file names.

    Raises:
        InputError: no such file, a type that is not read, a broken table, a missing column (the message lists those
            there are), an empty prompt (it names the row), a missing media file, or no query at all.
    """
    path = source.path
    if not path.exists():
        raise InputError(f"no file or folder {path}; check the path")
    if source.is_table and path.is_file():
        queries = _from_table(source)
    elif path.is_dir():
        queries = _from_folder(source)
    elif path.suffix.lower() in IMAGE_SUFFIXES + AUDIO_SUFFIXES:
        queries = [_from_media(path, source, path.name)]
    else:
        raise InputError(
            f"{path}: files of type '{path.suffix or 'no suffix'}' are not read; give a table "
            f"({', '.join(TABLE_SUFFIXES)}), a picture, a clip, or a folder of pictures or clips"
        )
    if not queries:
        raise InputError(f"{path}: holds no rows; give a file with at least one query")
    return queries[: source.limit]


def _from_folder(source: QuerySource) -> list[Query]:
    suffixes = IMAGE_SUFFIXES + AUDIO_SUFFIXES
    files = sorted(file for file in source.path.iterdir() if file.is_file() and file.suffix.lower() in suffixes)
    if not files:
        raise InputError(f"{source.path}: no pictures or clips in this folder; it may hold {', '.join(suffixes)}")
    return [_from_media(file, source, f"{source.path.name}/{file.name}") for file in files]


def _from_media(path: Path, source: QuerySource, query_id: str) -> Query:
    part: Part = ImagePart(image=path) if path.suffix.lower() in IMAGE_SUFFIXES else AudioPart(audio=path)
    text = (TextPart(text=source.text),) if source.text else ()
    return Query(id=query_id, parts=(part, *text), label=source.label, source=source.path.name)


def _from_table(source: QuerySource) -> list[Query]:
    if source.column is None and source.image_column is None and source.audio_column is None:
        columns = ", ".join(map(str, _read_table(source.path).columns))
        raise InputError(f"{source.path}: say which column holds the prompts (--column); it has {columns}")
    table = _read_table(source.path)
    for column in (source.column, source.image_column, source.audio_column):
        if column is not None and column not in table.columns:
            raise InputError(f"{source.path}: no column '{column}'; it has {', '.join(map(str, table.columns))}")
    records = table.head(source.limit).to_dict("records") if source.limit else table.to_dict("records")
    return [_from_row(source, number, record) for number, record in enumerate(records, start=1)]


def _from_row(source: QuerySource, number: int, record: dict[str, object]) -> Query:
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
    text = "" if value is None or value != value else str(value).strip()  # NaN is the one value unequal to itself
    if not text:
        raise InputError(f"{where}: empty prompt in column '{column}'; fill it or drop the row")
    return text


def _media_path(value: object, source: QuerySource, where: str, suffixes: tuple[str, ...]) -> Path:
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise InputError(f"{where}: no file named; fill the cell or drop the row")
    path = source.path.parent / text
    if not path.is_file():
        raise InputError(f"{where}: no file {path}; paths are read relative to the table's folder")
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{where}: {path.name} is none of {', '.join(suffixes)}")
    return path


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            separator = "," if suffix == ".csv" else "\t"
            return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return _records_table([json.loads(line) for line in lines if line.strip()], path)
        return _records_table(json.loads(path.read_text(encoding="utf-8-sig")), path)
    except InputError:
        raise
    except (ValueError, OSError) as error:  # parser, decoder and Arrow errors are all ValueErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable {suffix[1:]} table ({reason}); check the file") from None


def _records_table(content: object, path: Path) -> pd.DataFrame:
    import pandas as pd

    if isinstance(content, dict):
        # A mapping with one list of records in it ({"data": [...]}) is as common as a bare list.
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(f"{path}: expected a list of objects, one for each query")
    return pd.DataFrame(cast("list[dict[str, object]]", content))


def read_examples(path: Path, column: str, reply_column: str, label_column: str) -> list[Example]:
    """A training set from a table: prompts, the replies wanted, and labels (harmful or benign), text only.

    Raises:
        InputError: as `read_queries`; also an empty reply, or a label that is neither; the message names the row.
    """
    queries = read_queries(QuerySource(path=path, column=column))
    table = _read_table(path)
    for name in (reply_column, label_column):
        if name not in table.columns:
            raise InputError(f"{path}: no column '{name}'; it has {', '.join(map(str, table.columns))}")
    examples = []
    pairs = zip(queries, table[reply_column], table[label_column], strict=True)
    for number, (query, reply, label) in enumerate(pairs, start=1):
        if label not in ("harmful", "benign"):
            raise InputError(f"{path} row {number}: label {label!r} in column '{label_column}'; use harmful or benign")
        text = _cell_text(reply, f"{path} row {number}", reply_column)
        examples.append(Example(query=query.model_copy(update={"label": label}), reply=text))
    return examples
