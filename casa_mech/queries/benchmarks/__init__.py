"""The public benchmarks, each a declarative record; `read_queries` reads them by name."""

from casa_mech.queries.benchmarks.benchmark import Benchmark
from casa_mech.queries.benchmarks.mme import read_mme_results
from casa_mech.queries.benchmarks.named import BenchmarkSource, chosen_source, named_benchmark, read_chosen
from casa_mech.queries.benchmarks.read import read_benchmark, read_queries
from casa_mech.queries.benchmarks.registry import BENCHMARKS, benchmark_named

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkSource",
    "benchmark_named",
    "chosen_source",
    "named_benchmark",
    "read_benchmark",
    "read_chosen",
    "read_mme_results",
    "read_queries",
]
