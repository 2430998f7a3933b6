"""The bootstrap over two crossed factors: topics and wordings, say, each drawn anew whatever it meets of the other.

Owen's pigeonhole bootstrap (arXiv 0712.1111): an item weighs as often as its level of the one factor was drawn, times
as often as its level of the other. It errs, if at all, on the side of a wider interval.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import RESAMPLES, cluster_counts, members
from casa_mech.judging.estimate import Estimate


def crossed_interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic that takes weights.

    Args:
        statistic: from item weights [resample, n] to values [resample]; NaN where a resample does not allow one.
        first, second: [n], each item's level of either factor.
        seed, level: of the bootstrap.

    Raises:
        InputError: no item, factors of another length, or resamples that mostly do not allow the statistic.
    """
    if not len(first):
        raise InputError("a bootstrap needs at least one item")
    values = statistic(_weights(tuple(first), tuple(second), seed))
    usable = values[np.isfinite(values)]
    if len(usable) < len(values) / 2:
        raise InputError("too few topics or wordings for a bootstrap of this value: add data")
    low, high = np.quantile(usable, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def crossed_mean(
    values: Sequence[float] | np.ndarray, first: Sequence[Hashable], second: Sequence[Hashable], seed: int = 0
) -> Estimate:
    """Mean of `values` [n] with the interval of `crossed_interval`, widened to hold it."""
    numbers = np.asarray(values, dtype=np.float64)
    return crossed_ratio(numbers, np.ones_like(numbers), first, second, seed)


def crossed_ratio(
    above: np.ndarray, below: np.ndarray, first: Sequence[Hashable], second: Sequence[Hashable], seed: int = 0
) -> Estimate:
    """Sum of `above` [n] over the sum of `below` [n] with the interval of `crossed_interval`, widened to hold it."""

    def ratios(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            of_weights: np.ndarray = (weights @ above) / (weights @ below)
        return of_weights

    low, high = crossed_interval(ratios, first, second, seed)
    return Estimate(float(above.sum() / below.sum()), low, high).widened()


def crossed_test(
    one: Sequence[float] | np.ndarray,
    other: Sequence[float] | np.ndarray,
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    seed: int = 0,
) -> float:
    """Two-sided p of the mean difference of paired `one` [n] and `other` [n].

    How often the bootstrap's mean strays from the mean at least as far as that is from 0. A permutation of one factor
    would take the other's effects for the difference (5 % of noise then come out as 10).
    """
    differences = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    weights = _weights(tuple(first), tuple(second), seed)
    weights = weights[weights.any(axis=1)]
    mean = differences.mean()
    strayed = np.abs(weights @ differences / weights.sum(axis=1) - mean) >= abs(mean) - 1e-12
    return float(1 + strayed.sum()) / (1 + len(strayed))


@lru_cache(maxsize=16)
def _weights(first: tuple[Hashable, ...], second: tuple[Hashable, ...], seed: int) -> np.ndarray:
    """Weights [resample, n]; kept, since a figure's many intervals are over few sets of items."""
    rng, n = np.random.default_rng(seed), len(first)
    counts = []
    for factor in (first, second):
        member = members(factor, n)
        counts.append(cluster_counts(int(member.max()) + 1, RESAMPLES, rng)[:, member])
    return (counts[0] * counts[1]).astype(np.float64)
