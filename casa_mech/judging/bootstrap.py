"""The seeded bootstrap over topics and training runs, and the exact bound where it has no spread to draw from.

**Topics.** Draws about one topic are one cluster: a resample draws as many clusters as there are, with replacement.
**Training runs.** A claim about a *trained* system rests on several trainings. The statistic is then the mean of the
runs' own, under the same topics drawn, and every resample also moves it by a draw of Student's t on the spread between
the runs. Drawing the runs themselves is too narrow: of three, one resample in nine holds the same run three times, and
their spread is taken for known (coverage 79 % where runs differ more than topics; with Student's t 95 %).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.estimate import Estimate

RESAMPLES = 2000
Statistic = Callable[[np.ndarray], np.ndarray]
"""From weights of the items [resample, n] to values [resample]; NaN where a resample does not allow one."""
_BLOCK = 100


def members(clusters: Sequence[Hashable] | None, n: int) -> np.ndarray:
    """For each of `n` items the number of its cluster, int [n]; each item is its own where `clusters` is None.

    Raises:
        InputError: another number of clusters than of items.
    """
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise InputError(f"{n} scores but {len(clusters)} clusters: give one cluster a score")
    index = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    return np.array([index[name] for name in clusters], dtype=int)


def cluster_counts(n_clusters: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Counts of each cluster in each resample, int [resample, cluster]; every row sums to `n_clusters`."""
    picks = rng.integers(n_clusters, size=(resamples, n_clusters)) + n_clusters * np.arange(resamples)[:, None]
    return np.bincount(picks.ravel(), minlength=resamples * n_clusters).reshape(resamples, n_clusters)


def bootstrap_draws(
    statistic: Statistic,
    clusters: Sequence[Hashable] | None,
    n: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
    runs: Sequence[Hashable] | None = None,
) -> tuple[float, np.ndarray]:
    """The statistic, and what it becomes when topics and training runs are drawn anew, [resample].

    Args:
        statistic: from item weights to values.
        clusters: [n], which items are one draw; None: each is its own.
        n: number of items.
        seed, resamples: of the bootstrap.
        runs: [n], the training run (seed) of each item; None: one run.

    Raises:
        InputError: no item, or resamples that nearly never allow the statistic.
    """
    member, run = members(clusters, n), _runs(runs, n)
    masks = np.eye(int(run.max(initial=0)) + 1)[:, run]

    def by_run(counts: np.ndarray) -> np.ndarray:
        weights = counts[:, member]
        if len(masks) == 1:
            return statistic(weights)[:, None]
        return np.stack([statistic(weights * mask) for mask in masks], axis=1)

    return _draws(by_run, member, seed, resamples)


def mean_draws(
    values: np.ndarray,
    clusters: Sequence[Hashable] | None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    runs: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, np.ndarray]:
    """`bootstrap_draws` of the mean of `values` [n]; of the mean of the groups' means where `groups` [n] are given.

    It works on the sums of topics, not on items: a table of thousands of rows costs no more than one of its topics.
    """
    member, run, group = members(clusters, len(values)), _runs(runs, len(values)), _runs(groups, len(values))
    cells, cell = np.unique(np.stack([run, group]), axis=1, return_inverse=True)
    place = (cell.ravel(), member)
    sums, sizes = (np.zeros((cells.shape[1], int(member.max(initial=0)) + 1)) for _ in range(2))
    np.add.at(sums, place, values)
    np.add.at(sizes, place, 1)
    # Each run is the mean of its groups: [cell, run].
    shares = np.eye(int(run.max(initial=0)) + 1)[cells[0]]
    shares = shares / np.maximum(shares.sum(axis=0), 1)

    def by_run(counts: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            means: np.ndarray = (counts @ sums.T) / (counts @ sizes.T)
        return means @ shares

    return _draws(by_run, member, seed, resamples)


def _runs(runs: Sequence[Hashable] | None, n: int) -> np.ndarray:
    return np.zeros(n, dtype=int) if runs is None else members(runs, n)


def _draws(by_run: Statistic, member: np.ndarray, seed: int, resamples: int) -> tuple[float, np.ndarray]:
    """The mean of the runs' values and its resamples; `by_run`: from counts [resample, cluster] to [resample, run]."""
    if not len(member):
        raise InputError("a bootstrap needs at least one item")
    count = int(member.max()) + 1
    own = by_run(np.ones((1, count)))[0]
    spread = float(own.std(ddof=1)) / math.sqrt(len(own)) if len(own) > 1 else 0.0
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    usable = 0
    # Resamples that lack a class, say, are drawn again; after twenty times as many we give up.
    for _ in range(20 * max(1, -(-resamples // _BLOCK))):
        size = min(_BLOCK, resamples)
        block = by_run(cluster_counts(count, size, rng)).mean(axis=1)
        if spread:
            block = block + spread * rng.standard_t(len(own) - 1, size)
        values.append(block[np.isfinite(block)])
        usable += len(values[-1])
        if usable >= resamples:
            break
    if usable < resamples:
        raise InputError(f"too few clusters ({count}) for a bootstrap of this value: add data")
    return float(own.mean()), np.concatenate(values)[:resamples]


def bootstrap_interval(
    statistic: Statistic,
    clusters: Sequence[Hashable] | None,
    n: int,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    runs: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Percentile interval of a statistic that takes weights: `bootstrap_draws` has the arguments and errors."""
    _, draws = bootstrap_draws(statistic, clusters, n, seed, resamples, runs)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def exact_reach(draws: int, level: float = 0.95) -> float:
    """How large a rate may be of which `draws` independent draws have shown nothing: Clopper and Pearson's upper bound.

    About 3.7 / draws; what an interval reaches to where values without spread leave a bootstrap nothing to draw from.
    """
    return float(1 - ((1 - level) / 2) ** (1 / max(draws, 1)))


def mean_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    runs: Sequence[Hashable] | None = None,
    limits: tuple[float, float] | None = None,
) -> Estimate:
    """Mean of `values` [n] with a bootstrap over clusters and training runs, each run counted once.

    Args:
        values, clusters, seed, level, resamples, runs: as in `bootstrap_draws`.
        limits: between which values can lie. Values that are all alike then have an interval that reaches as far as
            the share of draws elsewhere between the limits that so many clusters cannot exclude (`exact_reach`);
            without limits their interval has no width.

    Raises:
        InputError: as `bootstrap_draws`.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if limits is not None and len(numbers) and (numbers == numbers[0]).all():
        value, reach = float(numbers[0]), exact_reach(int(members(clusters, len(numbers)).max()) + 1, level)
        return Estimate(value, value - reach * (value - limits[0]), value + reach * (limits[1] - value))

    value, draws = mean_draws(numbers, clusters, seed, resamples, runs)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    if limits is not None:
        low, high = max(limits[0], low), min(limits[1], high)
    return Estimate(value, float(low), float(high)).widened()
