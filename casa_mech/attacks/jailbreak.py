"""Jailbreak wrappers: a request put into a role play, a rule to forget, a story. Our own harmless sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
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
    meta = marked(query, wrapper=wrapper, surface=query.meta.get("surface", "text"), attack="jailbreak")
    return query.model_copy(update={"parts": tuple(parts), "meta": meta})
