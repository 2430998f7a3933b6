"""Estimates and how they are written out, paired differences, and labels permuted among clusters."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import (
    difference_p,
    label_permutation_test,
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
    reach = 1 - 0.025 ** (1 / 4)  # the chance of four draws without a hit is then 0.025
    assert change == (1.0, pytest.approx(1.0 - reach), 1.0) and p == 2 / 2**4


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


def test_labels_of_a_topic_that_has_both_are_permuted_within_it() -> None:
    clusters = np.repeat(["a", "b", "c", "d"], [2, 3, 4, 4])
    labels = np.array([0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0], dtype=bool)
    permuted = permuted_labels(labels, clusters, 200, np.random.default_rng(0))
    assert {tuple(row) for row in permuted[:, :5].tolist()} == {(False,) * 2 + (True,) * 3, (True,) * 2 + (False,) * 3}
    assert (permuted[:, 5:9].sum(axis=1) == 1).all() and (permuted[:, 9:].sum(axis=1) == 3).all()
    assert permuted[:, 5:].mean(axis=0) == pytest.approx([0.25] * 4 + [0.75] * 4, abs=0.1), "every place alike"


def noise(
    rng: np.random.Generator, runs: int = 1, topics: int = 16, rows: int = 4, between: float = 0.0
) -> tuple[np.ndarray, list[str], list[int]]:
    """Values without an effect, [run * topic * row], that share their topic's and their training run's chance."""
    shape = (runs, topics, rows)
    values = rng.normal(size=(1, topics, 1)) + between * rng.normal(size=(runs, 1, 1)) + rng.normal(size=shape)
    run, topic, _ = np.indices(shape)
    return values.ravel(), [f"t{number}" for number in topic.ravel()], run.ravel().tolist()


SETS = 300
"""Noise sets behind a test of the type-I error: at 5 % between 5 and 27 of them, in all but one case of a thousand."""


def assert_five_percent(p_values: list[float], exact: bool = True) -> None:
    """At 5 % a test errs on 5 % of noise sets, within binomial bounds of 99.9 %; one not `exact` may err less often."""
    least, most = stats.binom.ppf([0.0005, 0.9995], len(p_values), 0.05)
    assert (least if exact else 0) <= np.sum(np.array(p_values) <= 0.05) <= most


def test_the_permutation_of_pairs_errs_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    p_values = []
    for seed in range(SETS):
        values, topics, _ = noise(rng)
        p_values.append(permutation_test(values, np.zeros_like(values), topics, seed, 199))
    assert_five_percent(p_values)


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_a_difference_between_trained_systems_errs_as_often_as_it_says(between: float) -> None:
    """Three trainings that differ by chance: the permutation of topics alone calls every second of them an effect."""
    rng = np.random.default_rng(3)
    p_values, of_topics = [], []
    for seed in range(SETS):
        values, topics, runs = noise(rng, runs=3, between=between)
        zeros = np.zeros_like(values)
        p_values.append(difference_p(values, zeros, topics, seed, runs, resamples=199))
        of_topics.append(permutation_test(values, zeros, topics, seed, 199))
    assert_five_percent(p_values, exact=False)
    if between:
        assert np.mean(np.array(of_topics) <= 0.05) > 0.3


@pytest.mark.parametrize("kind", ["one label a topic", "both in each", "some of either"])
def test_labels_dealt_anew_err_as_often_as_they_say(kind: str) -> None:
    rng = np.random.default_rng(4)
    p_values = []
    for seed in range(SETS):
        values, topics, _ = noise(rng)
        mixed = {"one label a topic": 0, "both in each": 16, "some of either": 8}[kind]
        labels = np.repeat(np.arange(16) % 2 == 0, 4)
        labels[: 4 * mixed] = np.tile([True, False, False, True], mixed)
        p_values.append(
            label_permutation_test(
                lambda dealt, scores=values: aurocs_by_labels(scores, dealt), labels, topics, seed, 99
            )
        )
    assert_five_percent(p_values)


def test_differences_of_three_trainings_are_no_evidence_by_themselves() -> None:
    """Seed differences of 0.0, 1.1 and 6.5 points: t = 1.3 with two degrees of freedom, p = 0.3."""
    topics = [f"t{number}" for number in range(50)] * 3
    runs = np.repeat([0, 1, 2], 50)
    first = np.array([0.0, 0.011, 0.065])[runs] + 0.001 * np.sin(np.arange(150))
    change, p = paired_difference(first, np.zeros(150), topics, runs=runs.tolist())
    expected = stats.ttest_1samp([0.0, 0.011, 0.065], 0).pvalue
    assert p == pytest.approx(expected, abs=0.03) and change.low < 0 < change.value < change.high
    assert permutation_test(first, np.zeros(150), topics) < 0.001, "what topics alone would say"
    half = stats.t.ppf(0.975, 2) * stats.sem([0.0, 0.011, 0.065])
    assert (change.low, change.high) == pytest.approx((change.value - half, change.value + half), rel=0.2)


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
    dealt = draws.permuted(np.tile(label[list(dict.fromkeys(member))], (99, 1)), axis=1)
    member = np.array([list(dict.fromkeys(topics)).index(topic) for topic in topics])
    chance = [abs(roc_auc_score(row[member], scores) - 0.5) for row in dealt]
    expected = (1 + np.sum(np.array(chance) >= observed - 1e-12)) / 100
    p = label_permutation_test(lambda labels: np.abs(aurocs_by_labels(scores, labels) - 0.5), harmful, topics, 5, 99)
    assert p == expected and (p <= 0.02) == (shift > 0)
