"""`LoadedQueries`: queries from a file or a benchmark, with the account of what was left out."""

from __future__ import annotations

from dataclasses import dataclass

from casa_mech.queries.query import Query


@dataclass(frozen=True)
class LoadedQueries:
    """Queries from one source, with the account of how they were read."""

    name: str
    """The benchmark's or the file's."""
    queries: tuple[Query, ...]
    """Those that are left, in the source's order."""
    rows: int
    """How many rows there were before anything was left out."""
    dropped: tuple[str, ...] = ()
    """Ids of the rows left out because they mention minors in a sexual or harmful setting."""
    without_media: int = 0
    """How many queries were read without their picture (`missing_media="text"`)."""
    unscreened: int = 0
    """How many have no text of what they ask (a clip without a transcript), so that the filter could not read it."""
    files: tuple[str, ...] = ()
    """Where the rows came from."""
