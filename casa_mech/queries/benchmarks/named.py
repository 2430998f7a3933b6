"""Sources by what `--queries` names: a path, or a public set as `name` or `name:split`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks.read import MissingMedia, read_benchmark
from casa_mech.queries.benchmarks.registry import BENCHMARKS
from casa_mech.queries.files import QuerySource, read_source
from casa_mech.queries.loaded import LoadedQueries


@dataclass(frozen=True)
class BenchmarkSource:
    """A public set, or a split of one; its fields but `data` are as for `read_benchmark`."""

    name: str
    split: str | None = None
    data: Path | None = None
    """The folder that holds the sets; None: the one that CASA_MECH_DATA names, else the hub."""
    limit: int | None = None
    seed: int = 0

    @property
    def place(self) -> Path | None:
        """Where to read: `data`, and for clips, which have no telling names, the folder of the set's name in it."""
        return self.data / self.name if self.data and BENCHMARKS[self.name].modality == "audio" else self.data

    def read(self, missing_media: MissingMedia = "error") -> LoadedQueries:
        """The set's queries, labelled as it labels them. InputError: as `read_benchmark`."""
        return read_benchmark(self.name, self.place, self.split, self.limit, self.seed, missing_media=missing_media)


def named_benchmark(
    text: str, data: Path | None = None, limit: int | None = None, seed: int = 0
) -> BenchmarkSource | None:
    """The set that `text` means as `name` or `name:split`; None when it means none.

    Raises:
        InputError: a set that has no such split.
    """
    name, _, split = text.partition(":")
    if name not in BENCHMARKS:
        return None
    BENCHMARKS[name].check_split(split or None)
    return BenchmarkSource(name, split or None, data, limit, seed)


def chosen_source(
    entry: str, data: Path | None = None, limit: int | None = None, seed: int = 0, **fields: Any
) -> QuerySource | BenchmarkSource:
    """The source that `entry` names: what lies at that path, or else the public set of that name.

    Args:
        entry: the path, `name` or `name:split`.
        data, limit, seed: as for `BenchmarkSource`; of a path the first `limit` queries are taken.
        fields: of `QuerySource`, for a path.

    Raises:
        InputError: neither a path nor a set, or a set without that split.
    """
    if Path(entry).exists():
        return QuerySource(path=Path(entry), limit=limit, **fields)
    named = named_benchmark(entry, data, limit, seed)
    if named is None:
        raise InputError(
            f"no file or folder {entry}, and no public set of that name; casa-mech datasets lists the sets"
        )
    return named


def read_chosen(source: QuerySource | BenchmarkSource) -> LoadedQueries:
    """The queries of either kind of source, with the account of what was left out. InputError: as its reader."""
    return source.read() if isinstance(source, BenchmarkSource) else read_source(source)
