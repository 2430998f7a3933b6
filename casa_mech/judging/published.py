"""The CASA paper's published attack success rates as data, and the arithmetic that can be checked on them.

The numbers are targets and fixtures, drawn in panels of their own; nothing here was measured by this project. Where
the paper gives two values for one cell (9.2 in the main table, 9.1 in the ablation), both are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files

import pandas as pd

from casa_mech.errors import InputError
from casa_mech.judging.stats import possible_counts, smallest_n, wilson


@dataclass(frozen=True)
class PublishedRate:
    """One published attack success rate. `percent` is kept as printed; `n` is what the rates imply, or None."""

    table: str
    model_size: str
    model: str
    attention: bool
    safety_prompt: bool
    benchmark: str
    percent: str
    n: int | None
    source: str

    @property
    def value(self) -> float:
        """The rate as a fraction."""
        return float(self.percent) / 100

    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval as fractions under the implied n; None where no n or no count fits."""
        counts = possible_counts(self.percent, self.n) if self.n else []
        return wilson(counts[0], self.n) if counts and self.n else None


@dataclass(frozen=True)
class Finding:
    """One check of the published numbers: what was checked, what came out, and whether it holds."""

    check: str
    found: str
    holds: bool


@lru_cache(maxsize=1)
def published_rates() -> tuple[PublishedRate, ...]:
    """Every published rate: the main table (3B and 7B, four benchmarks) and the 3B ablation (three of them)."""
    data = json.loads((files("casa_mech.judging") / "published.json").read_text(encoding="utf-8"))
    sizes: dict[str, int | None] = data["benchmarks"]
    source = f"{data['paper']}; {data['source']}"
    rates = []
    for table, names in (("main", list(sizes)), ("ablation", [name for name in sizes if name != "JB-Prompt"])):
        for row in data[table]:
            attention = row.get("attention", row["model"] == "CASA")
            for size in (key for key in ("3B", "7B") if key in row):
                rates += [
                    PublishedRate(
                        table, size, row["model"], attention, row["safety_prompt"], name, text, sizes[name], source
                    )
                    for name, text in zip(names, row[size], strict=True)
                ]
    return tuple(rates)


def four_set_mean(model: str, model_size: str, safety_prompt: bool = False) -> float:
    """Mean of a main-table row over its four benchmarks, in percent."""
    row = [
        float(rate.percent)
        for rate in published_rates()
        if (rate.table, rate.model, rate.model_size, rate.safety_prompt) == ("main", model, model_size, safety_prompt)
    ]
    if not row:
        raise InputError(f"no published row for {model!r}, {model_size!r}, safety_prompt={safety_prompt}")
    return sum(row) / len(row)


def reduction(model: str, model_size: str, safety_prompt: bool = False) -> float:
    """Relative change of the four-set mean against the pretrained model, in percent (negative is better)."""
    before = four_set_mean("Pretrained", model_size)
    return 100 * (four_set_mean(model, model_size, safety_prompt) / before - 1)


def fitting_sizes(benchmark: str, up_to: int = 1000) -> list[int]:
    """The test-set sizes up to `up_to` of which every published rate of `benchmark` can be a count."""
    rates = [rate.percent for rate in published_rates() if rate.benchmark == benchmark]
    if not rates:
        raise InputError(f"no published rates for {benchmark!r}")
    return smallest_n(rates, up_to)


def check_published() -> list[Finding]:
    """What arithmetic alone says of the published numbers."""
    return [*_sizes_fit(), *_headline(), *_tables_agree()]


def _sizes_fit() -> Iterable[Finding]:
    for benchmark, n in {rate.benchmark: rate.n for rate in published_rates()}.items():
        fits = fitting_sizes(benchmark)
        first = ", ".join(map(str, fits[:3])) or "none"
        yield Finding(f"{benchmark}: sizes below 1000 that fit all rates", first, n is None or fits[:1] == [n])


def _headline() -> Iterable[Finding]:
    for size in ("3B", "7B"):
        for safety_prompt in (False, True):
            change = reduction("CASA", size, safety_prompt)
            how = "with" if safety_prompt else "without"
            yield Finding(f"{size} {how} safety prompt: reduction above 97 %", f"{-change:.1f} %", -change > 97)
    casa, breaker = four_set_mean("CASA", "3B"), four_set_mean("Circuit Breaker", "3B")
    yield Finding("3B without prompt: CASA below Circuit Breaker", f"{casa:.2f} against {breaker:.2f}", casa < breaker)


def _tables_agree() -> Iterable[Finding]:
    main = {
        (rate.benchmark, rate.safety_prompt): rate.percent
        for rate in published_rates()
        if (rate.table, rate.model, rate.model_size) == ("main", "CASA", "3B")
    }
    for rate in published_rates():
        if rate.table == "ablation" and rate.attention:
            other = main[rate.benchmark, rate.safety_prompt]
            prompt = "with" if rate.safety_prompt else "without"
            yield Finding(
                f"3B CASA {prompt} prompt, {rate.benchmark}: main table equals ablation",
                f"{other} and {rate.percent}",
                other == rate.percent,
            )


def published_table() -> pd.DataFrame:
    """The paper's attack success in percent, with the Wilson interval under the n that the rates imply.

    Not measured here. `–` where no n fits a benchmark's rates.
    """
    rows = []
    for rate in published_rates():
        interval = rate.interval()
        bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}] n={rate.n}" if interval else " [–]"
        named = rate.model + (" + safety prompt" if rate.safety_prompt else "")
        if rate.table == "ablation" and not rate.attention:
            named += ", no attention"
        where = {"table": rate.table, "model": f"Qwen2.5-Omni-{rate.model_size}", "defense": named}
        rows.append({**where, "benchmark": rate.benchmark, "cell": rate.percent + bounds})
    return pd.DataFrame(rows).pivot_table(
        index=["table", "model", "defense"], columns="benchmark", values="cell", aggfunc="first", sort=False
    )


def published_frame() -> pd.DataFrame:
    """The paper's own attack success rates (main table): `model, defense, attack, value`. Not measured here."""
    rows = [
        {
            "model": f"Qwen2.5-Omni-{rate.model_size}",
            "defense": rate.model + (" + safety prompt" if rate.safety_prompt else ""),
            "attack": rate.benchmark,
            "value": rate.value,
        }
        for rate in published_rates()
        if rate.table == "main"
    ]
    return pd.DataFrame(rows)


PANEL_COLUMNS = ("table", "model", "defense", "attack", "value", "low", "high", "n")


NOT_MEASURED = "Published by CASA's authors (arXiv 2604.00310), not measured here"


def published_panel() -> pd.DataFrame:
    """`PANEL_COLUMNS`, fractions: the main table and the 3B ablation as printed.

    Intervals are Wilson's under the smallest test-set size that fits all rates of a benchmark; NaN where none does.
    """
    rows = []
    for rate in published_rates():
        low, high = rate.interval() or (math.nan, math.nan)
        ablated = "attention" if rate.attention else "no attention"
        rows.append(
            {
                "table": rate.table,
                "model": f"Qwen2.5-Omni-{rate.model_size}",
                "defense": (ablated if rate.table == "ablation" else rate.model)
                + (" + safety prompt" if rate.safety_prompt else ""),
                "attack": rate.benchmark,
                "value": rate.value,
                "low": low,
                "high": high,
                "n": rate.n if math.isfinite(low) else None,
            }
        )
    return pd.DataFrame(rows, columns=list(PANEL_COLUMNS)).astype({"n": "Int64"})


def published_means() -> pd.DataFrame:
    """Mean of each main-table row over its four benchmarks, and its change against the pretrained model, in percent."""
    names = dict.fromkeys(
        (rate.model_size, rate.model, rate.safety_prompt) for rate in published_rates() if rate.table == "main"
    )
    return pd.DataFrame(
        [
            {
                "model": f"Qwen2.5-Omni-{size}",
                "defense": model + (" + safety prompt" if prompt else ""),
                "mean of four, %": round(four_set_mean(model, size, prompt), 2),
                "against pretrained, %": round(reduction(model, size, prompt), 1),
            }
            for size, model, prompt in names
        ]
    )


def published_checks() -> pd.DataFrame:
    """What arithmetic alone says of the published numbers: `check, found, holds`."""
    return pd.DataFrame([asdict(finding) for finding in check_published()])
