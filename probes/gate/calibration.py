"""Calibration of v_s as a probability: reliability curve, Brier score and expected calibration error."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import bootstrap_interval, mean_interval, members
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import rate_interval


@dataclass(frozen=True)
class Reliability:
    """Calibration of scores in [0, 1] as probabilities; intervals by cluster bootstrap."""

    curve: pd.DataFrame
    """One row a bin that is not empty: `low_edge, high_edge, mean_score, share` (of harmful queries, with its
    `low, high`) and `n`."""
    brier: Estimate
    """Brier score: mean squared error of the score; a constant 1/2 scores 0.25."""
    ece: Estimate
    """Expected calibration error: mean over queries of their bin's |share - mean score|. Biased upwards where bins are
    small; its interval is widened to hold its value."""
    bias: Estimate
    """Mean score minus share of harmful queries."""
    n: int
    """Queries."""


def reliability(
    scores: Sequence[float] | np.ndarray,
    harmful: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    bins: int = 10,
    seed: int = 0,
) -> Reliability:
    """Calibration of `scores` [n] in [0, 1] as probabilities of `harmful` [n], in `bins` of equal width.

    Raises:
        InputError: nothing to score, lengths that differ, or scores outside [0, 1].
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(harmful, dtype=np.float64)
    if not len(values) or values.shape != truth.shape:
        raise InputError(f"{len(values)} scores and {len(truth)} labels: give one label a score, and at least one")
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise InputError("calibration needs scores between 0 and 1: one of them is not")
    bin_of = np.minimum((values * bins).astype(int), bins - 1)
    member = np.eye(bins)[bin_of]

    def error(weights: np.ndarray) -> np.ndarray:
        return np.abs((weights * (truth - values)) @ member).sum(axis=1) / weights.sum(axis=1)

    value = float(error(np.ones((1, len(values))))[0])
    low, high = bootstrap_interval(error, clusters, len(values), seed)
    return Reliability(
        curve=_curve(values, truth, bin_of, bins, clusters, seed),
        brier=mean_interval((values - truth) ** 2, clusters, seed, limits=(0.0, 1.0)),
        ece=Estimate(value, low, high).widened(),
        bias=mean_interval(values - truth, clusters, seed, limits=(-1.0, 1.0)),
        n=len(values),
    )


def _curve(
    values: np.ndarray, truth: np.ndarray, bin_of: np.ndarray, bins: int, clusters: Sequence[Hashable] | None, seed: int
) -> pd.DataFrame:
    member = members(clusters, len(values))
    rows = []
    for number in np.unique(bin_of):
        here = bin_of == number
        share, low, high = rate_interval(truth[here], member[here].tolist(), seed)
        rows.append(
            {
                "low_edge": number / bins,
                "high_edge": (number + 1) / bins,
                "mean_score": values[here].mean(),
                "share": share,
                "low": low,
                "high": high,
                "n": int(here.sum()),
            }
        )
    return pd.DataFrame(rows)


def spiegelhalter(
    scores: Sequence[float] | np.ndarray,
    harmful: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> float:
    """Two-sided p of Spiegelhalter's Z test that `scores` [n] are calibrated probabilities of `harmful` [n].

    Z compares the Brier score with the one expected of calibrated scores (Spiegelhalter, Statistics in Medicine 5,
    1986). Queries of one cluster are one draw: the variance is the larger of the one that calibrated scores of
    independent queries have and of the clusters' own spread, and Student's t has as many degrees of freedom as there
    are clusters, less one. Scores of exactly 0, 1 or 1/2 tell nothing; where all are such and right, p is 1, and one
    that is wrong makes it 0.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(harmful, dtype=np.float64)
    slope = 1 - 2 * values
    excess, spread = float(((truth - values) * slope).sum()), float((slope**2 * values * (1 - values)).sum())
    if spread == 0:
        return 1.0 if excess == 0 else 0.0
    sums = np.bincount(members(clusters, len(values)), weights=(truth - values) * slope)
    if len(sums) < 2:
        return 1.0  # one draw has no spread to hold it against
    variance = max(spread, len(sums) * float(sums.var(ddof=1)))
    return float(2 * t.sf(abs(excess) / np.sqrt(variance), len(sums) - 1))
