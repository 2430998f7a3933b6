"""Queries: the frozen records that everything else works on (see docs/architecture.md), and how they are read."""

from casa_mech.queries.benchmarks import BENCHMARKS, Benchmark, read_benchmark, read_mme_results, read_queries
from casa_mech.queries.files import QuerySource, read_files, read_source
from casa_mech.queries.loaded import LoadedQueries
from casa_mech.queries.overlap import decontaminate, matches, overlaps, split_queries, underlying
from casa_mech.queries.prompts import Prompt, as_queries
from casa_mech.queries.query import (
    AudioPart,
    Example,
    ImagePart,
    Label,
    Part,
    Query,
    Reply,
    SafetyToken,
    TextPart,
    Turn,
)

__all__ = [
    "AudioPart",
    "BENCHMARKS",
    "Benchmark",
    "Example",
    "ImagePart",
    "Label",
    "Part",
    "Prompt",
    "Query",
    "QuerySource",
    "LoadedQueries",
    "Reply",
    "SafetyToken",
    "TextPart",
    "Turn",
    "as_queries",
    "decontaminate",
    "matches",
    "overlaps",
    "read_benchmark",
    "read_files",
    "read_mme_results",
    "read_queries",
    "read_source",
    "split_queries",
    "underlying",
]
