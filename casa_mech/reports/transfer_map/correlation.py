"""Rank correlation over points of which several belong to one organism."""

from __future__ import annotations

import numpy as np
import pandas as pd

from casa_mech.judging.bootstrap import RESAMPLES
from probes.linear.gate_transfer import interval, rank_correlation

PERMUTATIONS = 1999
LEAST = 4
"""Organisms below which a correlation says nothing."""


def organism_correlation(
    points: pd.DataFrame,
    predictor: str,
    outcome: str,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> dict[str, float] | None:
    """Spearman's correlation of two columns of `points`, with organisms (`member`) as the independent draws.

    The interval draws whole organisms with replacement. The p is two-sided: each organism's outcomes are given, surface
    by surface, to another organism, so that a difference between surfaces alone is no evidence. Points without a
    number on either side are left out.

    Returns:
        `n` (points), `organisms`, `value, low, high, p`; None for fewer than `LEAST` organisms, or a side that is the
        same everywhere.
    """
    sides = [points.pivot_table(index="member", columns="surface", values=name) for name in (predictor, outcome)]
    members, surfaces = (sides[0].axes[place].intersection(sides[1].axes[place]) for place in (0, 1))
    x, y = (side.reindex(index=members, columns=surfaces).to_numpy(float) for side in sides)
    known = (np.isfinite(x) & np.isfinite(y)).any(axis=1)
    x, y = x[known], y[known]
    value = _correlation(x, y)
    if len(x) < LEAST or not np.isfinite(value):
        return None
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(x), size=len(x)) for _ in range(resamples))
    low, high = interval([_correlation(x[rows], y[rows]) for rows in draws])
    chance = np.array([_correlation(x, y[rng.permutation(len(x))]) for _ in range(permutations)])
    extreme = int((np.abs(chance[np.isfinite(chance)]) >= abs(value) - 1e-12).sum())
    return {
        "n": int((np.isfinite(x) & np.isfinite(y)).sum()),
        "organisms": len(x),
        "value": value,
        "low": min(low, value),
        "high": max(high, value),
        "p": (1 + extreme) / (1 + permutations),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    both = np.isfinite(x) & np.isfinite(y)
    return rank_correlation(x[both], y[both])
