"""The seeded cluster bootstrap: draw as many clusters as there are, with replacement, and compute again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.estimate import Estimate

RESAMPLES = 1000
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
    picks = rng.integers(n_clusters, size=(resamples, n_clusters))
    return np.stack([np.bincount(pick, minlength=n_clusters) for pick in picks])


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters: Sequence[Hashable] | None,
    n: int,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile interval of a statistic that takes weights.

    Args:
        statistic: from item weights [resample, n] to values [resample]; NaN where a resample does not allow one.
        clusters: which items are one draw; None: each is its own.
        n: number of items.
        seed, level, resamples: of the bootstrap.

    Raises:
        InputError: no item, or resamples that nearly never allow the statistic.
    """
    if not n:
        raise InputError("a bootstrap needs at least one item")
    member = members(clusters, n)
    count = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    usable = 0
    # Resamples that lack a class, say, are drawn again; after twenty times as many we give up.
    for _ in range(20 * max(1, -(-resamples // _BLOCK))):
        block = statistic(cluster_counts(count, min(_BLOCK, resamples), rng)[:, member])
        values.append(block[np.isfinite(block)])
        usable += len(values[-1])
        if usable >= resamples:
            break
    if usable < resamples:
        raise InputError(f"too few clusters ({count}) for a bootstrap of this value: add data")
    low, high = np.quantile(np.concatenate(values)[:resamples], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of `values` [n] with a percentile bootstrap over clusters.

    Raises:
        InputError: as `bootstrap_interval`.
    """
    numbers = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_interval(
        lambda weights: weights @ numbers / weights.sum(axis=1), clusters, len(numbers), seed, level, resamples
    )
    return Estimate(float(numbers.mean()), low, high)
