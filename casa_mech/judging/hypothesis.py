"""Tests: paired values of two systems, labels against scores, and Holm's correction.

Draws that belong to one cluster (`casa_mech.judging.stats.cluster_of`) are kept together everywhere, and where the two
systems were trained several times, what differs between the trainings counts as chance, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import RESAMPLES, exact_reach, mean_draws, mean_interval, members
from casa_mech.judging.estimate import Estimate

PERMUTATIONS = 999
"""Permutations of labels behind a p: its least value is then 0.001."""
_BLOCK = 1000


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
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(f"a paired test compares the same queries: got values of shape {a.shape} and {b.shape}")
    sums = np.bincount(members(clusters, len(a)), weights=a - b)
    sums = sums[np.abs(sums) > 1e-12]
    if not len(sums):
        return 1.0
    # 1e-12: the same sum in another order is not a smaller one.
    least = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if 2 ** len(sums) <= resamples:
        signs = 1.0 - 2.0 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
        return float((np.abs(signs @ sums) >= least).mean())
    rng, extreme = np.random.default_rng(seed), 0
    for start in range(0, resamples, _BLOCK):
        signs = rng.choice((-1.0, 1.0), size=(min(_BLOCK, resamples - start), len(sums)))
        extreme += int((np.abs(signs @ sums) >= least).sum())
    return (1 + extreme) / (1 + resamples)


def mean_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    seed: int = 0,
    *,
    outcomes: bool = False,
    resamples: int = RESAMPLES,
    runs: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean of `first` [n] minus `second` [n] with a bootstrap over clusters and training runs, holding the mean.

    Args:
        first, second: values of the same queries.
        clusters: [n], what each pair is one draw with.
        seed, resamples: of the bootstrap.
        outcomes: the values are 0 or 1. Differences that are all alike then have no spread to draw from, and the
            interval reaches as far as the exact bound for as many draws as there are clusters.
        runs: [n], the training run of each pair; each run counts once.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if outcomes and (differences == differences[0]).all():
        value, reach = float(differences[0]), exact_reach(len(set(clusters)))
        return Estimate(value, max(-1.0, value - reach), min(1.0, value + reach))
    return mean_interval(differences, clusters, seed, resamples=resamples, runs=runs)


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    seed: int = 0,
    *,
    outcomes: bool = False,
    runs: Sequence[Hashable] | None = None,
) -> tuple[Estimate, float]:
    """`mean_difference` and the p of `difference_p`: what a claim about two systems stands on."""
    change = mean_difference(first, second, clusters, seed, outcomes=outcomes, runs=runs)
    return change, difference_p(first, second, clusters, seed, runs)


def difference_p(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    runs: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 9999,
) -> float:
    """Two-sided p of the mean difference of `first` [n] and `second` [n], each training run and group counted once.

    With one run it is that of `permutation_test`. With several it is the larger of two: that permutation of topics, and
    how often the hierarchical bootstrap (`mean_draws`: topics and Student's t over the runs) strays from its mean by as
    much as the mean is away from 0. Topics alone cannot tell a difference between systems from one between trainings.

    Raises:
        InputError: as `permutation_test`.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    shares = np.ones(len(first))
    if groups is not None or runs is not None:
        # Weights under which the mean over rows is that over runs and their groups.
        run = members(runs, len(first)) if runs is not None else np.zeros(len(first), dtype=int)
        cells, cell = np.unique(
            np.stack([run, members(groups, len(first)) if groups is not None else 0 * run]), axis=1, return_inverse=True
        )
        shares = len(first) / (np.bincount(cell.ravel()) * np.bincount(cells[0])[cells[0]])[cell.ravel()]
    p = permutation_test(first * shares, second * shares, clusters, seed, resamples)
    if runs is None or len(set(runs)) < 2:
        return p
    mean, draws = mean_draws(first - second, clusters, seed, resamples, runs, groups)
    return max(p, (1 + int((np.abs(draws - mean) >= abs(mean) - 1e-12).sum())) / (1 + resamples))


def permuted_labels(
    labels: np.ndarray, clusters: Sequence[Hashable] | np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Labels dealt anew, bool [draw, n]: whole clusters change labels with each other, mixed ones within.

    A cluster whose members all have one label gets that of another such cluster. Where a cluster has both labels, its
    members' are permuted among them: each keeps as many of either.

    Args:
        labels: bool [n]. clusters: [n]. draws: how many permutations. rng: makes them.
    """
    truth, member = np.asarray(labels, dtype=bool), members(list(clusters), len(labels))
    shares = np.bincount(member, weights=truth) / np.bincount(member)
    pure = np.isin(shares, (0.0, 1.0))
    of_clusters = np.zeros((draws, len(pure)), dtype=bool)
    of_clusters[:, pure] = rng.permuted(np.tile(shares[pure] == 1, (draws, 1)), axis=1)
    dealt = of_clusters[:, member]
    for number in np.flatnonzero(~pure):
        places = np.flatnonzero(member == number)
        dealt[:, places] = rng.permuted(np.tile(truth[places], (draws, 1)), axis=1)
    return dealt


def label_permutation_test(
    statistic: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    seed: int = 0,
    draws: int = PERMUTATIONS,
) -> float:
    """p of a statistic of labelled draws: how often labels dealt anew (`permuted_labels`) give as much.

    Args:
        statistic: from labels bool [draw, n] to values [draw]; the larger, the more the labels matter. One that
            ignores the sign makes the test two-sided.
        labels: bool [n]. clusters: [n]. seed, draws: of the permutations.
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
