"""Draws by id: which queries of a set are taken depends on the seed and on each query's id, never on the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from casa_mech.queries.query import Query


def sample(queries: Sequence[Query], limit: int | None, seed: int) -> list[Query]:
    """At most `limit` queries in their order; which ones depends on the seed and their ids only.

    The draw of a smaller limit is a part of the draw of a larger one.
    """
    if limit is None or limit >= len(queries):
        return list(queries)
    ranked = sorted(queries, key=lambda query: unit_draw(query.id, seed, "limit"))
    ids = {query.id for query in ranked[:limit]}
    return [query for query in queries if query.id in ids]


def unit_draw(key: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that is fixed by key, seed and purpose."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
