"""Jailbreak wrappers: a request put into a role play, a rule to forget, a story. Our own harmless sentences."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from casa_mech.attacks.text import marked
from casa_mech.errors import InputError
from casa_mech.queries import Query, TextPart

SLOT = "{request}"


@lru_cache(maxsize=1)
def wrappers() -> Mapping[str, tuple[str, ...]]:
    """The wrappers by split, `seen` and `held_out`; each holds `{request}` once."""
    data = json.loads((files("casa_mech.attacks") / "wrappers.json").read_text(encoding="utf-8"))
    return MappingProxyType({split: tuple(texts) for split, texts in data.items()})


def wrappers_of(split: str) -> tuple[str, ...]:
    """The wrappers of `seen`, `held_out` or `all`."""
    known = wrappers()
    if split == "all":
        return tuple(text for texts in known.values() for text in texts)
    if split not in known:
        raise InputError(f"unknown wrapper split {split!r}: use seen, held_out or all")
    return known[split]


def read_wrappers(path: Path | str, column: str = "wrapper") -> tuple[str, ...]:
    """The wrappers of a user's file, in order; each holds `{request}` once.

    A text file has one wrapper a line (empty lines are passed over). A JSON file is a list of texts, a list of objects
    with `column`, or a mapping of names to lists of texts. A CSV file has them in `column`.

    Raises:
        InputError: no such file, another type or layout, or a wrapper without `{request}`; it names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file of wrappers at {path}; check the path")
    try:
        placed_texts = _read_file(path, column)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except (json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise InputError(f"{path}: not readable as {path.suffix[1:]} ({error}); check the file") from None
    if not placed_texts:
        raise InputError(f"{path}: holds no wrapper; give at least one text with {SLOT}")
    for place, text in placed_texts:
        if not isinstance(text, str) or text.count(SLOT) != 1:
            raise InputError(
                f"{path} {place}: the wrapper {text!r} must hold {SLOT} exactly once, where the request goes"
            )
    return tuple(str(text) for _, text in placed_texts)


def _read_file(path: Path, column: str) -> list[tuple[str, object]]:
    """Each wrapper of a file with its place in it."""
    suffix, content = path.suffix.lower(), path.read_text(encoding="utf-8-sig")
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(content, newline=""))
        if column not in (reader.fieldnames or ()):
            raise InputError(f"{path}: no column {column!r}; it has {', '.join(reader.fieldnames or ())}")
        return [(f"row {number}", row[column]) for number, row in enumerate(reader, start=1)]
    if suffix == ".json":
        data = json.loads(content)
        if isinstance(data, dict) and all(isinstance(texts, list) for texts in data.values()):
            return [(f"{name} {at}", text) for name, texts in data.items() for at, text in enumerate(texts, start=1)]
        if not isinstance(data, list):
            raise InputError(f"{path}: expected a list of texts, or names with lists of texts")
        texts = [entry.get(column) if isinstance(entry, dict) else entry for entry in data]
        return [(f"entry {number}", text) for number, text in enumerate(texts, start=1)]
    if suffix not in (".txt", ""):
        raise InputError(f"{path}: wrappers are read from .txt, .json and .csv files, not {suffix}")
    lines = enumerate(content.split("\n"), start=1)
    return [(f"line {number}", line.rstrip("\r")) for number, line in lines if line.strip()]


def jailbreak(query: Query, wrapper: str) -> Query:
    """`query` with the wrapper's words around its text; pictures and clips stay where they are.

    What the wrapper says before the request goes before the first text part, what it says after goes after the last.
    """
    if wrapper.count(SLOT) != 1:
        raise InputError(f"the wrapper {wrapper!r} must hold {SLOT} exactly once")
    spots = [index for index, part in enumerate(query.parts) if isinstance(part, TextPart)]
    if not spots:
        raise InputError(f"query {query.id!r} has no text to wrap: a jailbreak wrapper needs a text part")
    before, after = wrapper.split(SLOT)
    parts = list(query.parts)
    for spot, lead, tail in ((spots[0], before, ""), (spots[-1], "", after)):
        part = parts[spot]
        assert isinstance(part, TextPart)
        parts[spot] = TextPart(text=lead + part.text + tail)
    meta = marked(query, wrapper=wrapper, surface=query.surface, attack="jailbreak")
    return query.model_copy(update={"parts": tuple(parts), "meta": meta})
