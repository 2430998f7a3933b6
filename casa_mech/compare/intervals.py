"""Means over attacks with an interval that no attack without a failure, or without a success, makes too narrow."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from casa_mech.judging.bootstrap import bootstrap_interval, members
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import rate_interval, wilson


def macro_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable],
    clusters: Sequence[Hashable],
    seed: int = 0,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Mean of the groups' means, each group counted once.

    A bootstrap over clusters. A group whose values are all alike has no spread to draw from: it adds, on either side,
    how far Wilson's interval for as many draws as it has clusters would let its mean move. One group of outcomes whose
    draws are independent gets Wilson's interval itself.

    Args:
        values, groups, clusters: [n]; for each draw its value, its group (an attack), and what it is one draw with.
        seed: of the bootstrap.
        limits: between which values lie: outcomes are 0 or 1, paired differences -1, 0 or 1.
    """
    numbers, number = np.asarray(values, dtype=np.float64), members(groups, len(values))
    if number.max() == 0 and limits == (0.0, 1.0):
        return rate_interval(numbers, list(clusters), seed)
    member = np.eye(number.max() + 1)[number]

    def means(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            of_groups: np.ndarray = ((weights @ (member * numbers[:, None])) / (weights @ member)).mean(axis=1)
        return of_groups

    value = float(means(np.ones((1, len(numbers))))[0])
    _, low, high = Estimate(value, *bootstrap_interval(means, list(clusters), len(numbers), seed)).widened()
    down, up = _slack(numbers, member, clusters, limits)
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
            reach = wilson(0, len({clusters[place] for place in np.flatnonzero(column).tolist()}))[1] / member.shape[1]
            down += reach * (alike[0] - limits[0])
            up += reach * (limits[1] - alike[0])
    return down, up


def over_seeds(values: Sequence[float], pooled: Estimate) -> tuple[Estimate, str]:
    """Mean of the seeds' rates with the wider of two intervals, and which that is.

    Args:
        values: the rate of each seed.
        pooled: of all seeds' draws put together. Its interval stands against Student's t over the seeds.
    """
    from scipy.stats import t

    mean = float(np.mean(values))
    estimate = Estimate(mean, pooled.low, pooled.high).widened()
    if len(values) < 2:
        return estimate, "draws of one seed"
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    if 2 * half >= estimate.high - estimate.low:
        return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half)), f"t over {len(values)} seeds"
    return estimate, f"draws of {len(values)} seeds"
