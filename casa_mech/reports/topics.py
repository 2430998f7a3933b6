"""Topics that safety training saw beside those held out from it, and what is chosen on one and judged on the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from casa_mech.compare.tables import TOPICS
from casa_mech.judging.estimate import Estimate
from casa_mech.plan.own_data import HALVES

CHOOSING, JUDGING = ("seen", HALVES[0]), ("held_out", HALVES[1])
"""Splits that something is chosen on, and those that it is then judged on: topics seen in safety training and held out
from it; of other plans, whose evaluation prompts are all unseen, two halves."""


def chosen_on(table: pd.DataFrame) -> tuple[str, str]:
    """What a choice is made and judged on, in words, from the column `split`."""
    if table["split"].isin(HALVES).any():
        return "one half of the prompts", "the other half"
    return "seen topics", "unseen topics"


def topic_table(
    rates: pd.DataFrame, down: str, across: str | Sequence[str], metric: str = "attack_success"
) -> pd.DataFrame:
    """A table to read: two columns, seen and held-out topics, for each value of `across`; `value [low, high]` in
    percent and n.

    Args:
        rates: rows with `metric, n, value, low, high` and the columns `down` and `across`: results of an attack table,
            or a comparison's summary. Metrics ending in `:seen` and `:held_out` are shown.
        down: column whose values are the rows, such as the attack.
        across: column or columns whose values are the columns, such as model and defence.
        metric: the rate.
    """
    across = [across] if isinstance(across, str) else list(across)
    names = {f"{metric}:{split}": name for split, name in TOPICS.items()}
    rows = rates[rates["metric"].isin(names)]
    cells = [Estimate.of(row).percent(n=row["n"]) for row in rows.to_dict("records")]
    rows = rows.assign(cell=cells, topics=[names[name] for name in rows["metric"]])
    # Rows and columns in the order of the table, seen before held out.
    order = [(*key, name) for key in rows[across].drop_duplicates().itertuples(index=False) for name in TOPICS.values()]
    table = rows.pivot_table(index=down, columns=[*across, "topics"], values="cell", aggfunc="first", sort=False)
    return table[[key for key in order if key in table.columns]].replace(np.nan, "–")
