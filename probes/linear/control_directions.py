"""Directions to compare an ablated one with: random ones along which states vary as much, and ones of dealt labels.

In a space of unequal spread a random direction has little variance: projecting it out takes little away whatever it
stands for. A control takes away as much as the direction that it is compared with, or is made as that one is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.hypothesis import permuted_labels


def equal_variance_directions(
    states: np.ndarray, direction: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Random unit vectors [draw, d_model] along which `states` [n, d_model] vary exactly as much as along `direction`.

    A Gaussian vector is tilted towards the directions in which the states vary more, or less: its part along the i-th
    principal axis is multiplied by (variance along it) ** (t / 2), with the t at which the variance fits.

    Raises:
        InputError: fewer than two states, or a direction of another width or of length zero.
    """
    if len(states) < 2 or direction.shape != states.shape[1:] or not np.linalg.norm(direction) > 0:
        raise InputError(
            f"a direction {direction.shape} and states {states.shape}: give at least two states of its width, and a "
            "direction that is not zero"
        )
    centred = states.astype(np.float64) - states.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(states))
    # Axes in which few states do not vary at all keep a little, so that they can be tilted towards.
    variances = np.maximum(variances, 1e-9 * variances[-1])
    unit = direction.astype(np.float64) / np.linalg.norm(direction)
    aim = float(variances @ (unit @ axes) ** 2)
    random = rng.standard_normal((draws, len(unit)))

    def tilted(t: np.ndarray) -> np.ndarray:
        """Squared parts along the axes [draw, axis], of sum 1."""
        logs = 2 * np.log(np.abs(random)) + t[:, None] * np.log(variances)
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        shares: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
        return shares

    # The variance rises with t: bisect.
    low, high = np.full(draws, -64.0), np.full(draws, 64.0)
    for _ in range(60):
        middle = (low + high) / 2
        short = tilted(middle) @ variances < aim
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    directions: np.ndarray = (np.sign(random) * np.sqrt(tilted((low + high) / 2))) @ axes.T
    return directions


def permuted_differences(
    states: np.ndarray, harmful: np.ndarray, clusters: Sequence[Hashable], draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Differences in means [draw, d_model] of `states` [n, d_model], harmful minus benign, under labels dealt anew.

    Labels are dealt as for a test, see `permuted_labels`.
    """
    dealt = permuted_labels(harmful, clusters, draws, rng).astype(np.float64)
    means: list[np.ndarray] = [labels @ states / labels.sum(axis=1, keepdims=True) for labels in (dealt, 1 - dealt)]
    return means[0] - means[1]
