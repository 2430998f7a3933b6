"""`Comparison`: a filled grid with the tables made from it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from casa_mech.compare.ablations import Variant
from casa_mech.compare.grid import GridResult


@dataclass(frozen=True)
class Comparison:
    """A filled grid with its tables: `tables.grid_rows`, `tables.summarise`, `paired.paired_tests`. variants: of the
    second grid, whose summary has their axis and level."""

    model: str
    result: GridResult
    rows: pd.DataFrame
    summary: pd.DataFrame
    tests: pd.DataFrame
    variants: tuple[Variant, ...] = ()

    @property
    def replies(self) -> pd.DataFrame:
        """Every reply."""
        return self.result.replies
