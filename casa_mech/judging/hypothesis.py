"""Tests: paired outcomes and values of two systems, labels against scores, and Holm's correction.

Draws that belong to one cluster (`casa_mech.judging.stats.cluster_of`) are kept together everywhere but in McNemar's
test, which takes each pair for a draw of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import RESAMPLES, mean_interval, members
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import wilson

PERMUTATIONS = 999
"""Permutations of labels behind a p: its least value is then 0.001."""


@dataclass(frozen=True)
class McNemar:
    """Two systems on the same queries."""

    only_first: int
    """Pairs with the outcome on the first side alone."""
    only_second: int
    """Pairs with the outcome on the second side alone."""
    p_value: float
    """Exact, two-sided."""


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> McNemar:
    """McNemar's exact test on paired outcomes [n].

    Raises:
        InputError: no pair, or another number of outcomes on one side.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(f"McNemar's test compares the same queries: got outcomes of shape {a.shape} and {b.shape}")
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    # Without a discordant pair statsmodels divides by nothing; the exact p is then 1 by definition.
    p_value = 1.0 if not table[0][1] + table[1][0] else float(test(table, exact=True).pvalue)
    return McNemar(table[0][1], table[1][0], p_value)


def permutation_test(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 9999,
) -> float:
    """Two-sided p of a paired permutation test on the mean difference of `first` [n] and `second` [n].

    Under the null a cluster's two systems can be swapped: all its pairs change sides together. Exact where the clusters
    are few enough to go through all swaps, else with `resamples` random ones.

    Raises:
        InputError: no pair, or another number of values on one side.
    """
    from scipy.stats import permutation_test as test

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(f"a paired test compares the same queries: got values of shape {a.shape} and {b.shape}")
    sums = np.bincount(members(clusters, len(a)), weights=a - b)
    sums = sums[np.abs(sums) > 1e-12]
    if not len(sums):
        return 1.0
    if len(sums) == 1:
        return 1.0  # one cluster, two swaps of equal size: scipy refuses, the answer is known
    result = test(
        (sums, np.zeros_like(sums)), lambda x, y, axis: (x - y).sum(axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=resamples, batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def mean_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    seed: int = 0,
    *,
    outcomes: bool = False,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of `first` [n] minus `second` [n] with a bootstrap over clusters, widened to hold the mean.

    Args:
        first, second: values of the same queries.
        clusters: [n], what each pair is one draw with.
        seed, resamples: of the bootstrap.
        outcomes: the values are 0 or 1. Differences that are all alike then have no spread to draw from, and the
            interval reaches as far as Wilson's for a rate of 0 in as many draws as there are clusters.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if outcomes and (differences == differences[0]).all():
        value, reach = float(differences[0]), wilson(0, len(set(clusters)))[1]
        return Estimate(value, max(-1.0, value - reach), min(1.0, value + reach))
    return mean_interval(differences, clusters, seed, resamples=resamples).widened()


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    seed: int = 0,
    *,
    outcomes: bool = False,
) -> tuple[Estimate, float]:
    """`mean_difference` and the p of `permutation_test`: what a claim about two systems stands on."""
    change = mean_difference(first, second, clusters, seed, outcomes=outcomes)
    return change, permutation_test(first, second, clusters, seed)


def permuted_labels(
    labels: np.ndarray, clusters: Sequence[Hashable] | np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Labels permuted among clusters, bool [draw, n]: a cluster gets one label, of those most of its members have.

    Args:
        labels: bool [n]. clusters: [n]. draws: how many permutations. rng: makes them.
    """
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    mostly = np.bincount(member, weights=labels) > np.bincount(member) / 2
    return np.stack([rng.permutation(mostly) for _ in range(draws)])[:, member]


def label_permutation_test(
    statistic: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    seed: int = 0,
    draws: int = PERMUTATIONS,
) -> float:
    """p of a statistic of labelled draws: how often labels permuted among clusters give as much.

    Args:
        statistic: from labels bool [draw, n] to values [draw]; the larger, the more the labels matter. One that
            ignores the sign makes the test two-sided.
        labels: bool [n]. clusters: [n], what gets one label. seed, draws: of the permutations.
    """
    labels = np.asarray(labels, dtype=bool)
    permuted = statistic(permuted_labels(labels, clusters, draws, np.random.default_rng(seed)))
    # 1e-12: the same sum in another order is not a smaller one.
    return float((1 + (permuted >= statistic(labels[None])[0] - 1e-12).sum()) / (1 + draws))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p values, in their order."""
    from statsmodels.stats.multitest import multipletests

    if not len(p_values):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # log(0) inside statsmodels for p = 1
        return [float(p) for p in multipletests(list(p_values), method="holm")[1]]
