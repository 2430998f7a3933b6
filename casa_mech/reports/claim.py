"""`Claim`: what a notebook ends with, and the table that shows up to three of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from casa_mech.evaluation.evaluate import CASA
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.results import value_row
from casa_mech.study import Study
from casa_mech.study.settings import slug


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


def name_of(study: Study) -> str:
    """The model under study, in a title."""
    return slug(study.settings.model)


def claim_rows(study: Study, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Claims in the result schema; `metric` holds the figure's name."""
    return [
        value_row(
            model=study.settings.model, defense=CASA, attack="see figure", surface="see figure", label="both",
            metric=claim.figure, seed=study.settings.seed, n=claim.n,
            **Estimate(claim.value, claim.low, claim.high).widened()._asdict(),
        )
        for claim in claims
    ]  # fmt: skip
