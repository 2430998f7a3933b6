"""The attack success rates that CASA's authors published (arXiv 2604.00310), and what arithmetic alone says of them.

They are targets and fixtures, drawn in panels of their own; nothing here was measured by this project. Where the paper
gives two values for one cell (9.2 in the main table, 9.1 in the ablation), both are kept. The paper gives no test-set
sizes and no intervals: a size is the smallest of which every rate of a benchmark can be a count, and the intervals are
Wilson's for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from importlib.resources import files

import pandas as pd

from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import wilson

NOT_MEASURED = "Published by CASA's authors (arXiv 2604.00310), not measured here"
"""The title of every figure and table of these numbers."""
MAIN, ABLATION = "main", "ablation"
"""The tables: 3B and 7B on four benchmarks; 3B on three of them, with and without safety attention."""
RATE_COLUMNS = ("table", "model", "defense", "attack", "value", "low", "high", "n")


def published_rates(table: str = "") -> pd.DataFrame:
    """Every published rate, `RATE_COLUMNS`, fractions: `table` is `MAIN` or `ABLATION`, `attack` the benchmark.

    Bounds and `n` are missing where no size fits a benchmark's rates. `table`: only that one.
    """
    rows = [
        {
            "table": rate.table,
            "model": _model(rate.size),
            "defense": rate.defense,
            "attack": rate.benchmark,
            **rate.estimate()._asdict(),
            "n": rate.n,
        }
        for rate in _rates()
        if table in ("", rate.table)
    ]
    return pd.DataFrame(rows, columns=list(RATE_COLUMNS)).astype({"n": "Int64"})


def published_table() -> pd.DataFrame:
    """The rates to read, in percent: a row a table, model and defence, a column a benchmark; `[–]` where no n fits."""
    cells = [
        f"{100 * rate.estimate().value:.1f} [–]" if rate.n is None else rate.estimate().percent(n=rate.n)
        for rate in _rates()
    ]
    return (
        published_rates()
        .assign(cell=cells)
        .rename(columns={"attack": "benchmark"})
        .pivot_table(
            index=["table", "model", "defense"], columns="benchmark", values="cell", aggfunc="first", sort=False
        )
    )


def published_means() -> pd.DataFrame:
    """Mean of each main-table row over its four benchmarks, and its change against the pretrained model, in percent."""
    names = dict.fromkeys((rate.size, rate.defense) for rate in _rates() if rate.table == MAIN)
    return pd.DataFrame(
        [
            {
                "model": _model(size),
                "defense": defense,
                "mean of four, %": round(_mean(size, defense), 2),
                "against pretrained, %": round(_change(size, defense), 1),
            }
            for size, defense in names
        ]
    )


def published_checks() -> pd.DataFrame:
    """Checks of the published numbers by arithmetic: `check` (a statement), `found` (text), `holds` (bool)."""
    return pd.DataFrame([*_sizes_fit(), *_headline(), *_tables_agree()], columns=["check", "found", "holds"])


def fitting_sizes(benchmark: str, up_to: int = 1000) -> list[int]:
    """The test-set sizes up to `up_to` of which every published rate of `benchmark` can be a count."""
    percents = [rate.percent for rate in _rates() if rate.benchmark == benchmark]
    return [n for n in range(1, up_to + 1) if all(possible_counts(percent, n) for percent in percents)]


def possible_counts(percent: float | str, n: int, decimals: int = 1) -> list[int]:
    """The counts k for which 100 k / n, rounded to `decimals` (halves up), is the published `percent`."""
    target = _rounded(Decimal(str(percent)), decimals)
    near = float(target) * n / 100
    reach = n / 100 * 10**-decimals + 1
    lowest, highest = max(0, math.floor(near - reach)), min(n, math.ceil(near + reach))
    return [k for k in range(lowest, highest + 1) if _rounded(Decimal(100 * k) / n, decimals) == target]


def _rounded(value: Decimal, decimals: int) -> Decimal:
    return value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP)


@dataclass(frozen=True)
class _Rate:
    """One cell of a published table."""

    table: str
    """`MAIN` or `ABLATION`."""
    size: str
    """Of the model, 3B or 7B."""
    system: str
    """The row's name as printed."""
    attention: bool
    """With safety attention."""
    safety_prompt: bool
    """With the safety prompt."""
    benchmark: str
    """The column."""
    percent: str
    """As printed."""
    n: int | None
    """The test-set size that the benchmark's rates imply; None where none fits."""

    @property
    def defense(self) -> str:
        """The row's name; the ablation's rows are all CASA, with attention and without."""
        ablated = "attention" if self.attention else "no attention"
        name = ablated if self.table == ABLATION else self.system
        return name + (" + safety prompt" if self.safety_prompt else "")

    def estimate(self) -> Estimate:
        """The rate as a fraction, with Wilson's interval where an n is known."""
        value = float(self.percent) / 100
        if self.n is None:
            return Estimate(value, math.nan, math.nan)
        return Estimate(value, *wilson(possible_counts(self.percent, self.n)[0], self.n))


@lru_cache(maxsize=1)
def _rates() -> tuple[_Rate, ...]:
    content = json.loads((files("casa_mech.judging") / "published.json").read_text(encoding="utf-8"))
    sizes: dict[str, int | None] = content["benchmarks"]
    rates = []
    for table, names in ((MAIN, list(sizes)), (ABLATION, [name for name in sizes if name != "JB-Prompt"])):
        for row in content[table]:
            attention = row.get("attention", row["model"] == "CASA")
            for size in (key for key in ("3B", "7B") if key in row):
                rates += [
                    _Rate(table, size, row["model"], attention, row["safety_prompt"], name, percent, sizes[name])
                    for name, percent in zip(names, row[size], strict=True)
                ]
    return tuple(rates)


def _model(size: str) -> str:
    return f"Qwen2.5-Omni-{size}"


def _mean(size: str, defense: str) -> float:
    """Mean of a main-table row over its four benchmarks, in percent."""
    row = [float(rate.percent) for rate in _rates() if (rate.table, rate.size, rate.defense) == (MAIN, size, defense)]
    return sum(row) / len(row)


def _change(size: str, defense: str) -> float:
    """Relative change of the four-set mean against the pretrained model, in percent (negative is better)."""
    return 100 * (_mean(size, defense) / _mean(size, "Pretrained") - 1)


def _sizes_fit() -> Iterator[tuple[str, str, bool]]:
    for benchmark, n in {rate.benchmark: rate.n for rate in _rates()}.items():
        fits = fitting_sizes(benchmark)
        first = ", ".join(map(str, fits[:3])) or "none"
        yield f"{benchmark}: sizes below 1000 that fit all rates", first, n is None or fits[:1] == [n]


def _headline() -> Iterator[tuple[str, str, bool]]:
    for size in ("3B", "7B"):
        for how, defense in (("without", "CASA"), ("with", "CASA + safety prompt")):
            change = _change(size, defense)
            yield f"{size} {how} safety prompt: reduction above 97 %", f"{-change:.1f} %", -change > 97
    casa, breaker = _mean("3B", "CASA"), _mean("3B", "Circuit Breaker")
    yield "3B without prompt: CASA below Circuit Breaker", f"{casa:.2f} against {breaker:.2f}", casa < breaker


def _tables_agree() -> Iterator[tuple[str, str, bool]]:
    main = {
        (rate.benchmark, rate.safety_prompt): rate.percent
        for rate in _rates()
        if (rate.table, rate.system, rate.size) == (MAIN, "CASA", "3B")
    }
    for rate in _rates():
        if rate.table == ABLATION and rate.attention:
            other = main[rate.benchmark, rate.safety_prompt]
            prompt = "with" if rate.safety_prompt else "without"
            check = f"3B CASA {prompt} prompt, {rate.benchmark}: main table equals ablation"
            yield check, f"{other} and {rate.percent}", other == rate.percent
