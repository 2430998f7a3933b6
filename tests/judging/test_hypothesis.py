"""Estimates and how they are written out, paired differences, and labels permuted among clusters."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import (
    label_permutation_test,
    mcnemar,
    mean_difference,
    paired_difference,
    permutation_test,
    permuted_labels,
)
from casa_mech.judging.stats import aurocs_by_labels, rate, rate_interval, wilson


def test_an_estimate_is_written_out_in_one_way() -> None:
    estimate = Estimate(0.125, 0.1, 0.25)
    assert estimate.text() == "0.12 [0.10, 0.25]" and estimate.text(".3f", n=7) == "0.125 [0.100, 0.250] n=7"
    assert estimate.percent() == "12.5 [10.0, 25.0]" and estimate.text(".0%") == "12% [10%, 25%]"
    assert Estimate(-1, -2, 3).bounds("+.1f") == "[-2.0, +3.0]"
    assert Estimate.of(pd.Series({"value": 1, "low": 0, "high": 2, "n": 3})) == Estimate.of(Estimate(1, 0, 2)._asdict())
    assert rate(3, 10) == rate_interval([True] * 3 + [False] * 7) == (0.3, *wilson(3, 10))


def test_an_interval_is_widened_to_hold_its_value_and_none_stays_none() -> None:
    assert Estimate(0.3, 0.4, 0.5).widened() == (0.3, 0.3, 0.5)
    assert Estimate(0.6, 0.4, 0.5).widened() == (0.6, 0.4, 0.6)
    none = Estimate(0.6, math.nan, math.nan).widened()
    assert math.isnan(none.low) and math.isnan(none.high)


def test_pairs_that_share_a_topic_are_one_draw() -> None:
    topics = [f"t{place // 5}" for place in range(20)]
    change, p = paired_difference([1.0] * 20, [0.0] * 20, topics, outcomes=True)
    reach = wilson(0, 4)[1]
    assert change == (1.0, 1.0 - reach, 1.0) and p == 2 / 2**4
    assert mcnemar([True] * 20, [False] * 20).p_value < 1e-4, "what ignoring the topics would say"


def test_a_difference_is_the_mean_of_pairs_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    first, second, topics = rng.random(60), rng.random(60), [f"t{place % 12}" for place in range(60)]
    change, p = paired_difference(first, second, topics, seed=3)
    assert change == mean_interval(first - second, topics, 3) and p == permutation_test(first, second, topics, 3)
    alike = mean_difference([2.0] * 5, [1.5] * 5, list(range(5)))
    assert alike == (0.5, 0.5, 0.5), "values without limits have no other spread than their own"
    assert mean_difference([True, False] * 9, [False] * 18, topics[:18], outcomes=True).value == 0.5


def test_permuted_labels_are_one_a_cluster() -> None:
    clusters = np.repeat(["a", "b", "c", "d"], [1, 2, 3, 4])
    labels = np.isin(clusters, ["b", "d"])
    permuted = permuted_labels(labels, clusters, 50, np.random.default_rng(0))
    assert permuted.shape == (50, 10) and len({tuple(row) for row in permuted.tolist()}) == 6
    for row in permuted:
        by_cluster = {name: set(row[clusters == name].tolist()) for name in "abcd"}
        assert all(len(values) == 1 for values in by_cluster.values())
        assert sum(True in values for values in by_cluster.values()) == 2


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_a_label_permutation_is_the_one_that_goes_draw_by_draw(shift: float) -> None:
    """The loop that each report had of its own, with the same generator."""
    rng = np.random.default_rng(1)
    topics = np.repeat([f"t{number}" for number in range(14)], 5)
    harmful = np.repeat(rng.permutation([True, False] * 7), 5)
    scores = rng.normal(size=70).round(1) + shift * harmful
    names, member = np.unique(topics, return_inverse=True)
    label = np.zeros(len(names), dtype=bool)
    label[member[harmful]] = True
    draws = np.random.default_rng(5)
    observed = abs(roc_auc_score(harmful, scores) - 0.5)
    chance = [abs(roc_auc_score(draws.permutation(label)[member], scores) - 0.5) for _ in range(99)]
    expected = (1 + np.sum(np.array(chance) >= observed - 1e-12)) / 100
    p = label_permutation_test(lambda labels: np.abs(aurocs_by_labels(scores, labels) - 0.5), harmful, topics, 5, 99)
    assert p == expected and (p <= 0.02) == (shift > 0)
