"""`Estimate`: a value with its interval, and how both are written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class Estimate(NamedTuple):
    """A value with its interval; `_asdict()` are the three columns of a table. NaN bounds stand for no interval."""

    value: float
    """The estimate itself."""
    low: float
    """Lower end of the interval, 95 % unless said otherwise."""
    high: float
    """Upper end of the interval."""

    @classmethod
    def of(cls, row: Mapping[str, Any] | pd.Series) -> Estimate:
        """The columns `value, low, high` of a row."""
        return cls(row["value"], row["low"], row["high"])

    def widened(self) -> Estimate:
        """The same with an interval that holds the value: a percentile interval of a skewed statistic can miss it."""
        return Estimate(self.value, min(self.low, self.value), max(self.high, self.value))

    def times(self, factor: float) -> Estimate:
        """Value and bounds in another unit."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)

    def bounds(self, spec: str = ".2f") -> str:
        """`[low, high]`; `spec` is a format specification of Python's."""
        return f"[{self.low:{spec}}, {self.high:{spec}}]"

    def text(self, spec: str = ".2f", n: int | None = None) -> str:
        """`value [low, high]`, and ` n=...` where `n` is given."""
        return f"{self.value:{spec}} {self.bounds(spec)}" + ("" if n is None else f" n={n}")

    def percent(self, spec: str = ".1f", n: int | None = None) -> str:
        """A fraction's `text` in percent, without the sign."""
        return self.times(100).text(spec, n)
