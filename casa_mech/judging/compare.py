"""Two systems on the same queries: paired differences, tests and Holm's correction over the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.merit import OUTCOME_METRICS
from casa_mech.judging.stats import clusters_of, holm, mcnemar, permutation_test
from casa_mech.judging.verdict import UNDECIDED

if TYPE_CHECKING:
    import pandas as pd

COMPARISON_COLUMNS = (
    "attack", "surface", "label", "metric", "system_a", "system_b", "n", "undecided", "clusters", "value_a", "value_b",
    "difference", "low", "high", "only_a", "only_b", "test", "p", "p_holm",
)  # fmt: skip
_KEYS = ("attack", "surface", "label")


def compare_systems(replies_a: pd.DataFrame, replies_b: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Paired tests between two systems that answered the same queries.

    Args:
        replies_a, replies_b: tables of replies with `model`, `defense`, `attack`, `surface`, `label`, `query_id` and
            `outcome`; `topic` where known (it makes clusters, see `cluster_of`).
        seed: of the bootstrap and the permutations.

    Returns:
        A row for each attack, surface, label and metric (`attack_success`, `over_refusal`, `benign_answered`), with
        `COMPARISON_COLUMNS`. Pairs that either side left undecided are left out and counted in `undecided`.
        `difference` is a - b with a cluster-bootstrap interval; `only_a`, `only_b` count the pairs that have the
        outcome on one side only. The test is McNemar's (exact) where every pair is a cluster of its own, else a
        permutation test that swaps whole clusters. `p_holm` is corrected over the whole table.

    Raises:
        InputError: a missing column, a query twice in one cell, or queries that only one system answered.
    """
    import pandas as pd

    a, b = _checked(replies_a, "the first"), _checked(replies_b, "the second")
    names = _system(a), _system(b)
    rows = []
    cells_b = dict(iter(b.groupby(list(_KEYS), sort=False)))
    cells_a = dict(iter(a.groupby(list(_KEYS), sort=False)))
    if set(cells_a) != set(cells_b):
        odd = sorted(map(str, set(cells_a) ^ set(cells_b)))[0]
        raise InputError(f"only one of the systems has replies to {odd}: compare the same attacks and labels")
    for cell, part in cells_a.items():
        pairs = _paired(part, cells_b[cell], cell)
        for metric, (label, outcome) in OUTCOME_METRICS.items():
            if label == cell[2]:
                rows.append({**dict(zip(_KEYS, cell, strict=True)), **_row(pairs, metric, outcome, names, seed)})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def _row(pairs: pd.DataFrame, metric: str, outcome: str, names: tuple[str, str], seed: int) -> dict[str, Any]:
    decided = pairs[(pairs["outcome_a"] != UNDECIDED) & (pairs["outcome_b"] != UNDECIDED)]
    row: dict[str, Any] = {
        "metric": metric, "system_a": names[0], "system_b": names[1], "n": len(decided),
        "undecided": len(pairs) - len(decided),
    }  # fmt: skip
    if decided.empty:
        empty = dict.fromkeys(("value_a", "value_b", "difference", "low", "high"), float("nan"))
        return {**row, **empty, "clusters": 0, "only_a": 0, "only_b": 0, "test": "none", "p": 1.0}
    first, second = ((decided[f"outcome_{side}"] == outcome).to_numpy() for side in "ab")
    clusters = clusters_of(decided)
    difference, low, high = mean_interval(first.astype(float) - second, clusters, seed)
    paired = mcnemar(list(first), list(second))
    alone = len(set(clusters)) == len(clusters)
    return {
        **row,
        "clusters": len(set(clusters)),
        "value_a": float(np.mean(first)),
        "value_b": float(np.mean(second)),
        "difference": difference,
        "low": low,
        "high": high,
        "only_a": paired.only_first,
        "only_b": paired.only_second,
        "test": "McNemar" if alone else "permutation",
        "p": paired.p_value if alone else permutation_test(first, second, clusters, seed),
    }


def _checked(replies: pd.DataFrame, which: str) -> pd.DataFrame:
    missing = [name for name in (*_KEYS, "query_id", "outcome") if name not in replies.columns]
    if missing:
        raise InputError(f"{which} table of replies lacks {', '.join(missing)}")
    twice = replies[replies.duplicated([*_KEYS, "query_id"])]
    if len(twice):
        raise InputError(f"{which} table answers query {twice['query_id'].iloc[0]!r} twice under one attack")
    return replies


def _paired(a: pd.DataFrame, b: pd.DataFrame, cell: tuple[str, ...]) -> pd.DataFrame:
    odd = sorted(set(a["query_id"]) ^ set(b["query_id"]))
    if odd:
        raise InputError(
            f"only one of the systems answered query {odd[0]!r} of {' '.join(cell)}: compare the same queries"
        )
    return a.merge(b[["query_id", "outcome"]], on="query_id", suffixes=("_a", "_b"), validate="one_to_one")


def _system(replies: pd.DataFrame) -> str:
    names = [name for name in ("model", "defense") if name in replies.columns]
    return " + ".join("/".join(map(str, replies[name].unique())) for name in names) or "unnamed"
