"""How well the readings of several gates tell harm: AUROCs averaged over surfaces and gates, with interval and test."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd

from casa_mech.judging.bootstrap import RESAMPLES, bootstrap_draws, exact_reach
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import label_permutation_test
from casa_mech.judging.stats import _weighted_auroc, aurocs_by_labels


def mean_auroc(readings: pd.DataFrame, seed: int = 0, score: str = "v_s") -> tuple[Estimate, float]:
    """AUROC of `score`, averaged over surfaces and then gates, with its interval and its p against chance.

    The interval is a bootstrap over topics and gates. The p, two-sided, permutes labels over topics; where there are
    several gates it is the larger of that and how often the bootstrap strays from its value by as much as that is away
    from 0.5, since labels say nothing of how gates differ.

    Args:
        readings: `query_id, topic, label, surface, gate_seed` and `score`; each gate has read every request on each
            surface, under the same id.
        seed: of bootstrap and permutations.
        score: the column that is scored.
    """
    wide, labels, topics = _wide(readings, score)
    scores, runs = wide.to_numpy().T, [str(gate) for gate, _ in wide.columns]
    estimate, draws = _bootstrap([(1.0, scores)], labels, topics, runs, seed)

    def away(dealt: np.ndarray) -> np.ndarray:
        return np.abs(np.mean([aurocs_by_labels(row, dealt) for row in scores], axis=0) - 0.5)

    p = label_permutation_test(away, labels, topics, seed)
    return estimate, max(p, _strays(draws, estimate.value, 0.5)) if len(set(runs)) > 1 else p


def auroc_change(
    before: pd.DataFrame, after: pd.DataFrame, seed: int = 0, score: str = "v_s"
) -> tuple[Estimate, float]:
    """How much higher `mean_auroc` is on `after` than on `before`, of the same requests and gates, with interval and p.

    The p, two-sided, says how often a bootstrap over topics and gates strays from its value by as much as that is away
    from 0.
    """
    (first, labels, topics), (second, _, _) = _wide(after, score), _wide(before, score)
    second = second.reindex(index=first.index, columns=first.columns)
    runs = [str(gate) for gate, _ in first.columns]
    sides = [(1.0, first.to_numpy().T), (-1.0, second.to_numpy().T)]
    estimate, draws = _bootstrap(sides, labels, topics, runs, seed)
    return estimate, _strays(draws, estimate.value, 0.0)


def _wide(readings: pd.DataFrame, score: str) -> tuple[pd.DataFrame, np.ndarray, list[Hashable]]:
    """Scores [request, (gate, surface)], and each request's label (True: harmful) and topic."""
    wide = readings.pivot(index=["query_id", "label", "topic"], columns=["gate_seed", "surface"], values=score)
    index = wide.index.to_frame()
    return wide, (index["label"] == "harmful").to_numpy(), index["topic"].tolist()


def _bootstrap(
    sides: Sequence[tuple[float, np.ndarray]],
    labels: np.ndarray,
    topics: Sequence[Hashable],
    runs: Sequence[Hashable],
    seed: int,
) -> tuple[Estimate, np.ndarray]:
    """The signed sum of the sides' mean AUROCs, and its draws; a side's scores are [gate and surface, request]."""
    n = len(labels)

    def statistic(weights: np.ndarray) -> np.ndarray:
        of_set = weights.reshape(len(weights), len(runs), n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a set of another gate than the one that is weighed
            value = sum(
                sign * np.nanmean([_weighted_auroc(row, labels, of_set[:, k]) for k, row in enumerate(scores)], axis=0)
                for sign, scores in sides
            )
        return np.asarray(value)

    each = [run for run in runs for _ in range(n)]
    value, draws = bootstrap_draws(statistic, [*topics] * len(runs), len(each), seed, RESAMPLES, each)
    low, high = np.quantile(draws, [0.025, 0.975])
    if len(sides) == 1 and value in (0.0, 1.0):
        # Nothing to draw from: the exact bound for as many pairs of topics as there are.
        of_label = [
            len({topic for topic, label in zip(topics, labels, strict=True) if label == kind}) for kind in (0, 1)
        ]
        reach = exact_reach(max(1, min(*of_label, len(set(topics)) // 2)))
        low, high = value - reach, value + reach
    least = 0.0 if len(sides) == 1 else -1.0
    return Estimate(value, max(least, float(low)), min(1.0, float(high))).widened(), draws


def _strays(draws: np.ndarray, value: float, null: float) -> float:
    return float((1 + (np.abs(draws - value) >= abs(value - null) - 1e-12).sum()) / (1 + len(draws)))
