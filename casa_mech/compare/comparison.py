"""`Comparison`: a filled grid with the tables made from it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from casa_mech.compare.ablations import Variant
from casa_mech.compare.grid import GridResult


@dataclass(frozen=True)
class Comparison:
    """A filled grid with its tables."""

    model: str
    """The model's name."""
    result: GridResult
    """The replies and the costs."""
    rows: pd.DataFrame
    """Every rate in the result schema (`tables.grid_rows`)."""
    summary: pd.DataFrame
    """The grid over seeds (`tables.summarise`); of the second grid with axis and level (`ablations.ablation_frame`)."""
    tests: pd.DataFrame
    """Every row against CASA (`paired.paired_tests`)."""
    variants: tuple[Variant, ...] = ()
    """Of the second grid."""

    @property
    def replies(self) -> pd.DataFrame:
        """Every reply."""
        return self.result.replies
