"""Randomness that belongs to a query: the same seed and id give the same draw, whatever else is in the list."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from casa_mech.errors import InputError
from casa_mech.queries import Query

PAIR = "pair"
"""Key of `Query.meta`: queries of one pair draw alike."""


def query_rng(query: Query, seed: int, purpose: str) -> np.random.Generator:
    """A generator fixed by `seed`, the query's pair or else its id, and what it is for."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{query.meta.get(PAIR, query.id)}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def paired(queries: Sequence[Query], counterparts: Sequence[Query]) -> tuple[list[Query], list[Query]]:
    """`queries` and their `counterparts`, pairwise marked with `meta["pair"]` (the first one's id), in their orders.

    Under any attack and seed the two of a pair then get the same wrapper, voice, speed, noise level, colours and size:
    they differ in content alone, as a matched control must.

    Raises:
        InputError: there are not as many counterparts as queries.
    """
    if len(queries) != len(counterparts):
        raise InputError(
            f"{len(queries)} queries and {len(counterparts)} benign counterparts: each query needs one, give as many "
            "of both"
        )
    marks = [{PAIR: query.id} for query in queries]
    first, second = (
        [query.model_copy(update={"meta": {**query.meta, **mark}}) for query, mark in zip(group, marks, strict=True)]
        for group in (queries, counterparts)
    )
    return first, second
