"""All benchmarks by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks.benchmark import Benchmark
from casa_mech.queries.benchmarks.benign import BENIGN
from casa_mech.queries.benchmarks.figstep import FIGSTEP
from casa_mech.queries.benchmarks.harmful import HARMFUL
from casa_mech.queries.benchmarks.jailbreakv import JAILBREAKV
from casa_mech.queries.benchmarks.mm_safetybench import MM_SAFETYBENCH
from casa_mech.queries.benchmarks.mme import MME
from casa_mech.queries.benchmarks.spoken import SPOKEN

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {entry.name: entry for entry in (*HARMFUL, *JAILBREAKV, *FIGSTEP, *MM_SAFETYBENCH, *SPOKEN, *BENIGN, *MME)}
)
"""Harmful ones first, by family."""


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        InputError: no such benchmark; the known ones are listed.
    """
    if name not in BENCHMARKS:
        raise InputError(
            f"no benchmark '{name}'; there are {', '.join(BENCHMARKS)}, and 'table' for a file of your own"
        )
    return BENCHMARKS[name]
