"""Duplicates and overlaps between sets of queries, decontamination of a training set, and splits by query.

Two queries are compared by what is asked (`underlying`), never by how it is rendered. They are the same when the
normalised texts are equal ("exact"), and nearly the same ("near") when word 8-grams that both have cover at least half
of the shorter one's words: the rule by which Tulu 3 decontaminates (arXiv 2411.15124). Stock phrases of eight words
count, so a near match errs on the side of removing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from casa_mech.errors import InputError
from casa_mech.queries.draws import unit_draw
from casa_mech.queries.query import Example, Query

NGRAM = 8
SHARE = 0.5
_BLOCK = 2000
Item = TypeVar("Item", Query, Example)


@dataclass(frozen=True)
class Match:
    """Two queries that ask the same, by their ids."""

    first: str
    second: str
    kind: Literal["exact", "near"]
    share: float
    """How much of the shorter text's words the common 8-grams cover, in 0..1."""


@dataclass(frozen=True)
class Overlap:
    """How much two sets share; a set with itself: how much it repeats."""

    first: str
    second: str
    n_first: int
    """Queries of the first set; `n_second` those of the other."""
    n_second: int
    exact: int
    """How many queries of the first are in the second word for word."""
    near: int
    """How many are in it nearly, and not word for word."""


@dataclass(frozen=True)
class Removed:
    """One query taken out of a training set."""

    id: str
    evaluation: str
    """The evaluation set that it matches."""
    match: str
    """The id of the query there."""
    kind: Literal["exact", "near"]
    share: float
    """As in `Match`."""


@dataclass(frozen=True)
class Decontaminated:
    """The account of what was taken out of a training set."""

    n: int
    """How many queries it had before."""
    removed: tuple[Removed, ...]


def underlying(query: Query) -> str:
    """The request, however it is rendered: `meta["request"]`, else the text."""
    return query.meta.get("request") or query.text


def normalised(text: str) -> str:
    """`text` for comparison: Unicode NFKC, lower case, words only, one blank between them."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("’", "")
    return " ".join(re.findall(r"\w+", plain))


def matches(first: Sequence[Query], second: Sequence[Query]) -> list[Match]:
    """For each query of `first` that is also in `second`: its best match there, in the order of `first`.

    A query without words (a clip without a transcript) matches nothing.
    """
    return [match for match in _matched(first, second) if match is not None]


def _matched(first: Sequence[Query], second: Sequence[Query]) -> list[Match | None]:
    texts, others = ([normalised(underlying(query)) for query in queries] for queries in (first, second))
    place = {text: number for number, text in reversed(list(enumerate(others)))}
    near = _near([text for text in dict.fromkeys(texts) if text not in place], list(place))

    def match(query: Query, text: str) -> Match | None:
        if text and text in place:
            return Match(query.id, second[place[text]].id, "exact", 1.0)
        if text in near:
            other, share = near[text]
            return Match(query.id, second[place[other]].id, "near", share)
        return None

    return [match(query, text) for query, text in zip(first, texts, strict=True)]


def duplicates(queries: Sequence[Query]) -> list[Match]:
    """The queries that repeat an earlier one of the same list word for word, each with the first of its kind."""
    seen: dict[str, str] = {}
    repeats = []
    for query in queries:
        text = normalised(underlying(query))
        if text and text in seen:
            repeats.append(Match(query.id, seen[text], "exact", 1.0))
        seen.setdefault(text, query.id)
    return repeats


def overlaps(sets: Mapping[str, Sequence[Query]]) -> list[Overlap]:
    """The overlap of every set with itself (repeats, word for word) and of every two sets, both ways round."""
    shared = []
    for first, queries in sets.items():
        for second, others in sets.items():
            same = duplicates(queries) if first == second else matches(queries, others)
            kinds = Counter(match.kind for match in same)
            shared.append(Overlap(first, second, len(queries), len(others), kinds["exact"], kinds["near"]))
    return shared


def decontaminate(
    train: Sequence[Item], evaluations: Mapping[str, Sequence[Query]]
) -> tuple[list[Item], Decontaminated]:
    """`train` without what any evaluation set asks, and the account of what was removed.

    Args:
        train: queries, or examples (by their queries).
        evaluations: all evaluation sets of the run, by name.

    Returns:
        The items left, in their order, and the removed ones, each with the first set that it matches.
    """
    queries = [item.query if isinstance(item, Example) else item for item in train]
    removed: dict[int, Removed] = {}
    for name, evaluation in evaluations.items():
        for place, match in enumerate(_matched(queries, evaluation)):
            if match is not None and place not in removed:
                removed[place] = Removed(match.first, name, match.second, match.kind, match.share)
    kept = [item for place, item in enumerate(train) if place not in removed]
    return kept, Decontaminated(len(train), tuple(removed[place] for place in sorted(removed)))


def split_queries(queries: Sequence[Query], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[Query]]:
    """Queries in named parts; all that ask the same, however rendered, fall into one part.

    Args:
        queries: to be split; their order is kept within a part.
        shares: the expected share of each part; they sum to 1.
        seed: of the draw. A query's part depends on the seed, the shares and what it asks alone, not on the others.

    Raises:
        InputError: shares that are negative or do not sum to 1.
    """
    if not shares or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"shares must not be negative and sum to 1, not {dict(shares)}")
    parts: dict[str, list[Query]] = {name: [] for name in shares}
    for query in queries:
        draw = unit_draw(normalised(underlying(query)) or query.id, seed, "split")
        parts[_part_at(draw, shares)].append(query)
    return parts


def _part_at(draw: float, shares: Mapping[str, float]) -> str:
    total = 0.0
    for name, share in shares.items():
        total += share
        if draw < total:
            return name
    return [name for name, share in shares.items() if share > 0][-1]


def _near(first: Sequence[str], second: Sequence[str]) -> dict[str, tuple[str, float]]:
    """For each text of `first` with a near match in `second`: the best one and its share.

    Candidates are all pairs with a common 8-gram, found exactly as a product of sparse count matrices. (MinHash LSH, 64
    bands of one row, lost 2 % of the near pairs of 18,793 against 31,323 prompts and took six times as long.)
    """
    from sklearn.feature_extraction.text import CountVectorizer

    rows = [text for text in first if text.count(" ") >= NGRAM - 1]
    columns = [text for text in second if text.count(" ") >= NGRAM - 1]
    if not rows or not columns:
        return {}
    counter = CountVectorizer(analyzer=_ngrams, binary=True)
    theirs = counter.fit_transform(columns).T.tocsr()
    best: dict[str, tuple[str, float]] = {}
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        common = (counter.transform(block) @ theirs).tocoo()
        for row, column in zip(common.row, common.col, strict=True):
            share = covered(block[row], columns[column])
            if share >= SHARE and share > best.get(block[row], ("", 0.0))[1]:
                best[block[row]] = (columns[column], share)
    return best


def covered(first: str, second: str) -> float:
    """The share of the shorter text's words that lie in word 8-grams which the longer one has too; texts normalised."""
    shorter, longer = sorted((first, second), key=lambda text: text.count(" "))
    grams, words = set(_ngrams(longer)), shorter.count(" ") + 1
    inside: set[int] = set()
    for place, gram in enumerate(_ngrams(shorter)):
        if gram in grams:
            inside.update(range(place, place + NGRAM))
    return len(inside) / words


def _ngrams(text: str) -> Iterable[str]:
    words = text.split()
    return [" ".join(words[place : place + NGRAM]) for place in range(len(words) - NGRAM + 1)]
