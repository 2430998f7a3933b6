"""What titles have to be, and when a figure's numbers are those of another run."""

from __future__ import annotations

import pandas as pd


def assert_one_line(title: str) -> None:
    """A title is one line of about 100 letters; the names of test models are long."""
    assert "\n" not in title and len(title) <= 115, (len(title), title)


def unlike(kept: pd.DataFrame, made: pd.DataFrame, apart: frozenset[str] = frozenset()) -> list[str]:
    """The columns in which two tables of one figure differ by more than another order of sums and trainings does.

    Text is the same row by row, and nine of ten truth values. Numbers are off by a tenth of their range on average, and
    by no more than they are large: a sign that is wrong throughout is a difference of twice their size, even where one
    row makes the range so wide that the rest hardly counts.
    """
    if list(kept.columns) != list(made.columns) or len(kept) != len(made):
        return ["columns and rows"]
    differing = []
    for column in kept.columns:
        one, other = kept[column], made[column]
        if column in apart:
            continue
        if pd.api.types.is_bool_dtype(one):
            alike = (one == other).mean() >= 0.9
        elif pd.api.types.is_numeric_dtype(one):
            off = (one - other).abs().mean()
            alike = pd.isna(off) or off <= min(0.1 * (one.max() - one.min()), one.abs().mean()) + 1e-7
            alike = alike and list(one.isna()) == list(other.isna())
        else:
            alike = list(one.fillna("")) == list(other.fillna(""))
        if not alike:
            differing.append(column)
    return differing
