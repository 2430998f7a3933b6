"""Means over attacks with an interval that no attack without a failure, or without a success, makes too narrow."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from casa_mech.judging.bootstrap import exact_reach, mean_draws, members
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import rate_interval


def macro_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable],
    clusters: Sequence[Hashable],
    seed: int = 0,
    limits: tuple[float, float] = (0.0, 1.0),
    runs: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean of the groups' means, each group counted once, and each training run.

    A bootstrap over clusters and runs. A group whose values are all alike has no spread to draw from: it adds, on
    either side, how far the exact bound for as many draws as it has clusters would let its mean move. One group of
    outcomes gets `rate_interval`.

    Args:
        values, groups, clusters: [n]; for each draw its value, its group (an attack), and what it is one draw with.
        seed: of the bootstrap.
        limits: between which values lie: outcomes are 0 or 1, paired differences -1, 0 or 1.
        runs: [n], the training seed of each draw; None: one.
    """
    numbers, number = np.asarray(values, dtype=np.float64), members(groups, len(values))
    if number.max() == 0 and limits == (0.0, 1.0):
        return rate_interval(numbers, list(clusters), seed, runs=runs)
    value, draws = mean_draws(numbers, clusters, seed, runs=runs, groups=groups)
    _, low, high = Estimate(value, *np.quantile(draws, (0.025, 0.975))).widened()
    down, up = _slack(numbers, np.eye(number.max() + 1)[number], clusters, limits)
    below, above = math.hypot(value - low, down), math.hypot(high - value, up)
    return Estimate(value, max(limits[0], value - below), min(limits[1], value + above))


def _slack(
    values: np.ndarray, member: np.ndarray, clusters: Sequence[Hashable], limits: tuple[float, float]
) -> tuple[float, float]:
    """(down, up): how far groups without spread could pull the mean; they share clusters, so their shares add up."""
    down = up = 0.0
    for column in member.T.astype(bool):
        alike = values[column]
        if alike.min() == alike.max():
            reach = exact_reach(len({clusters[place] for place in np.flatnonzero(column).tolist()})) / member.shape[1]
            down += reach * (alike[0] - limits[0])
            up += reach * (limits[1] - alike[0])
    return down, up
