"""`Claim`: what a notebook ends with, and the table that shows them; `Heading`: the words of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pandas as pd
from pandas.io.formats.style import Styler

from casa_mech.evaluation.evaluate import CASA
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.results import value_row
from casa_mech.study import Study


class Heading(NamedTuple):
    """The words of a figure, in the order in which a plot takes them."""

    title: str
    """What the figure shows, one line of about 100 letters at most."""
    caption: str
    """The numbers behind it, in whole sentences."""


@dataclass(frozen=True)
class Claim:
    """A claim and what it stands on."""

    title: str
    """The claim, one line of about 100 letters at most."""
    statement: str
    """The claim in full, with its numbers and intervals."""
    figure: str
    """Name of the figure that shows it."""
    n: int
    """What was counted: queries, pairs or points."""
    value: float
    """The number that the claim is about."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end of its 95 % interval."""
    test: str
    """The test, in words."""
    p: float
    """Its p value."""
    refuted_if: str
    """What would show the claim to be wrong."""

    @property
    def heading(self) -> Heading:
        """The words of the figure that shows it."""
        return Heading(self.title, self.statement)


def claim_table(claims: Sequence[Claim]) -> Styler:
    """The claims to read in a notebook, a column each, no sentence cut short."""
    names = [f"claim {number}" for number in range(1, len(claims) + 1)]
    frame = pd.DataFrame([asdict(claim) for claim in claims], index=names).T
    return frame.style.format(precision=3).set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


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


def listed(names: Sequence[object]) -> str:
    """Names in a sentence: `a, b and c`."""
    words = [str(name) for name in names]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def span(values: Sequence[float] | pd.Series, spec: str = ".2f") -> str:
    """The range of some numbers in a sentence: `low to high`, or the one number that they all round to."""
    low, high = f"{min(values):{spec}}", f"{max(values):{spec}}"
    return low if low == high else f"{low} to {high}"
