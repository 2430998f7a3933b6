"""`Claim`: what a notebook ends with, and the table that shows up to three of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd
from pandas.io.formats.style import Styler


@dataclass(frozen=True)
class Claim:
    """One statement and what it stands on: a figure, a value with its 95 % interval, a test, and its refutation."""

    statement: str
    figure: str
    n: int
    value: float
    low: float
    high: float
    test: str
    p: float
    refuted_if: str


def claim_table(claims: Sequence[Claim]) -> Styler:
    """The claims to read in a notebook, a column each, no sentence cut short."""
    names = [f"claim {number}" for number in range(1, len(claims) + 1)]
    frame = pd.DataFrame([asdict(claim) for claim in claims], index=names).T
    return frame.style.format(precision=3).set_properties(**{"text-align": "left", "white-space": "pre-wrap"})
