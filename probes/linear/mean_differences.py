"""Length and direction of the difference of class means, on a surface and against text, without sampling noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import bootstrap_interval, members
from casa_mech.judging.estimate import Estimate
from probes.activations.memory import Activations

MEASURES = ("length", "shrinkage", "cosine")
Statistic = Callable[[np.ndarray], np.ndarray]


def mean_differences(
    text: np.ndarray,
    other: np.ndarray,
    harmful: np.ndarray,
    topics: Sequence[str],
    seed: int = 0,
    measures: Sequence[str] = ("shrinkage", "cosine"),
) -> dict[str, Estimate]:
    """How the difference of class means on a surface compares with that on text, by measure.

    `length` is its root mean square over the features; `shrinkage` is the ratio of the lengths (1: as long as text's);
    `cosine` is that of the angle between them. Both surfaces show the same requests, every feature is divided by its
    spread on text, and the lengths are of the means without sampling noise: the topics that were drawn part two classes
    a little even where harm does not, and the same topics do so on every surface, so what the spread between topics
    explains is taken off the squared lengths and the inner product. A surface on which nothing is left has length and
    shrinkage 0 and no cosine (NaN).

    Args:
        text, other: states [request, d_model] of the same requests.
        harmful: bool [request].
        topics: of each request; what a bootstrap draws.
        seed: of the bootstrap.
        measures: which of `MEASURES`.
    """
    spread = text.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    sides = [np.asarray(states, dtype=np.float64) / scale for states in (text, other)]
    sides = [states - states.mean(axis=0) for states in sides]
    noise = _noise(sides, harmful, members(topics, len(topics)))

    def products(weights: np.ndarray, times: int) -> np.ndarray:
        """Squared length on text, squared length there, inner product, [3, resample]; noise taken off `times`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            parts = [weights * label / (weights * label).sum(axis=1, keepdims=True) for label in (harmful, ~harmful)]
            first, second = ((parts[0] - parts[1]) @ states for states in sides)
        raw = [(first * first).sum(axis=1), (second * second).sum(axis=1), (first * second).sum(axis=1)]
        return np.stack(raw) - times * noise[:, None]

    statistics: dict[str, Statistic] = {
        "length": partial(_length, width=text.shape[1]),
        "shrinkage": _shrinkage,
        "cosine": _cosine,
    }
    estimates = {}
    for name in measures:
        value = float(statistics[name](products(np.ones((1, len(topics))), 1))[0])
        # A resample has the sampling noise twice: once drawn, once drawn again.
        again = partial(_of_resample, statistics[name], products)
        try:
            low, high = bootstrap_interval(again, topics, len(topics), seed)
            estimates[name] = Estimate(value, low, high).widened()
        except InputError:  # hardly a resample in which text parts the classes
            estimates[name] = Estimate(value, np.nan, np.nan)
    return estimates


def mean_difference_table(activations: Activations, base: str = "text", seed: int = 0) -> pd.DataFrame:
    """`MEASURES` of every surface against the surface `base`, at every site.

    Args:
        activations: the same requests on every surface, in the same order.
        base: the surface that spreads are taken from and that the others are compared with.
        seed: of the bootstrap.

    Returns:
        Columns `site, surface, measure, n, value, low, high`; the base itself has its length alone.

    Raises:
        InputError: a surface with other requests than the base's.
    """
    surfaces = list(dict.fromkeys(activations.index["surface"]))
    by_surface = {surface: activations.where(surface=surface) for surface in [base, *surfaces]}
    own = by_surface[base]
    rows = []
    for surface in surfaces:
        there = by_surface[surface]
        if list(there.index["query_id"]) != list(own.index["query_id"]):
            raise InputError(f"surface '{surface}' has other requests than '{base}': collect the same on both")
        measures = MEASURES if surface != base else MEASURES[:1]
        for site in activations.sites:
            differences = mean_differences(own.at(site), there.at(site), own.harmful, list(own.topics), seed, measures)
            rows += [
                {"site": site, "surface": surface, "measure": measure, "n": len(own.index), **estimate._asdict()}
                for measure, estimate in differences.items()
            ]
    return pd.DataFrame(rows)


def _of_resample(
    statistic: Statistic, products: Callable[[np.ndarray, int], np.ndarray], weights: np.ndarray
) -> np.ndarray:
    return statistic(products(weights, 2))


def _noise(sides: Sequence[np.ndarray], harmful: np.ndarray, topic: np.ndarray) -> np.ndarray:
    """What the drawn topics alone add to the three products of `mean_differences`: [text², other², inner product]."""
    total = np.zeros(3)
    for label in (harmful, ~harmful):
        present = np.unique(topic[label])
        shares = (topic[None, label] == present[:, None]).astype(np.float64) / max(1, label.sum())
        # How far each topic draws its class's mean: sums over its requests, [topic, d_model].
        first, second = (shares @ (states[label] - states[label].mean(axis=0)) for states in sides)
        correction = len(present) / max(1, len(present) - 1)
        total += correction * np.array([(first * first).sum(), (second * second).sum(), (first * second).sum()])
    return total


def _length(products: np.ndarray, width: int) -> np.ndarray:
    return np.sqrt(np.clip(products[1], 0, None) / width)


def _shrinkage(products: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.clip(products[1], 0, None) / products[0]
    return np.where(products[0] > 0, np.sqrt(np.abs(ratio)), np.nan)


def _cosine(products: np.ndarray) -> np.ndarray:
    positive = (products[0] > 0) & (products[1] > 0)
    size = np.sqrt(np.where(positive, products[0] * products[1], 1.0))
    return np.where(positive, np.clip(products[2] / size, -1, 1), np.nan)
