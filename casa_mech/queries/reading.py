"""What came of reading a file or a benchmark: the queries, and what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from casa_mech.queries.query import Query


@dataclass(frozen=True)
class Reading:
    """Queries with the account of how they were read.

    name: the benchmark's or the file's. queries: those that are left. rows: how many rows there were before anything
    was left out. dropped: ids of the rows left out because they mention minors in a sexual or harmful setting.
    without_media: how many queries were read without their picture (`missing_media="text"`). unscreened: how many
    have no text of what they ask (a clip without a transcript), so that the filter could not read it. files: where
    the rows came from.
    """

    name: str
    queries: tuple[Query, ...]
    rows: int
    dropped: tuple[str, ...] = ()
    without_media: int = 0
    unscreened: int = 0
    files: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The account without the queries, for tables and manifests."""
        return {
            "name": self.name,
            "rows": self.rows,
            "read": len(self.queries),
            "dropped_minors": len(self.dropped),
            "without_media": self.without_media,
            "unscreened": self.unscreened,
            "files": list(self.files),
        }


def sample(queries: Sequence[Query], limit: int | None, seed: int) -> list[Query]:
    """At most `limit` queries in their order; which ones depends on the seed and their ids only.

    The draw of a smaller limit is a part of the draw of a larger one.
    """
    if limit is None or limit >= len(queries):
        return list(queries)
    chosen = sorted(queries, key=lambda query: unit_draw(query.id, seed, "limit"))[:limit]
    wanted = {query.id for query in chosen}
    return [query for query in queries if query.id in wanted]


def unit_draw(key: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that is fixed by key, seed and purpose."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
