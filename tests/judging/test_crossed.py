"""The bootstrap over two crossed factors: known standard errors, and how often its intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from casa_mech.errors import InputError
from casa_mech.judging.crossed import crossed_interval, crossed_mean, crossed_ratio, crossed_test


def test_one_factor_alone_is_the_ordinary_bootstrap() -> None:
    values = np.arange(50.0)
    mean = crossed_mean(values, list(range(50)), ["one"] * 50)
    error = values.std() / np.sqrt(50)
    assert mean.value == 24.5 and mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    other = crossed_mean(values, ["one"] * 50, list(range(50)))
    assert other.high - other.low == pytest.approx(mean.high - mean.low, rel=0.08)


def test_both_factors_widen_the_interval() -> None:
    """Effects of 20 topics and of 10 wordings, each seen with each: variances add up."""
    rng = np.random.default_rng(0)
    topic, wording = np.repeat(np.arange(20), 10), np.tile(np.arange(10), 20)
    of_topic, of_wording = rng.standard_normal(20), rng.standard_normal(10)
    values = of_topic[topic] + of_wording[wording]
    error = np.sqrt(of_topic.var() / 20 + of_wording.var() / 10)
    mean = crossed_mean(values, topic.tolist(), wording.tolist())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Twelve wordings dealt to forty topics, one each, as in notebook 08: at least nine times in ten of 95 %."""
    rng = np.random.default_rng(1)
    topic, wording = list(range(48)), [number % 12 for number in range(48)]
    held = 0
    for _ in range(200):
        values = rng.standard_normal(48) + rng.standard_normal(12)[wording]
        mean = crossed_mean(values, topic, wording)
        held += mean.low <= 0 <= mean.high
    assert held >= 180


@pytest.mark.parametrize(("of_topics", "of_wordings"), [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_noise_is_significant_as_often_as_it_may_be(of_topics: float, of_wordings: float) -> None:
    """Paired noise with effects of topics and of wordings: at 5 %, at most 17 of 200 (binomial, 98.8 %)."""
    rng = np.random.default_rng(2)
    topic, wording = [number // 2 for number in range(72)], [number % 12 for number in range(72)]
    significant = 0
    for _ in range(200):
        noise = rng.standard_normal(72)
        noise += of_topics * rng.standard_normal(36)[topic] + of_wordings * rng.standard_normal(12)[wording]
        significant += crossed_test(noise, np.zeros(72), topic, wording) <= 0.05
    assert significant <= 17


def test_a_difference_beyond_both_factors_is_significant() -> None:
    topic, wording = list(range(48)), [number % 12 for number in range(48)]
    noise = np.random.default_rng(0).standard_normal(48)
    assert crossed_test(2 + noise, np.zeros(48), topic, wording) < 0.01
    assert crossed_test(noise, noise, topic, wording) == 1


def test_a_ratio_is_one_of_sums() -> None:
    below = np.array([1.0, 3.0, 2.0, 4.0])
    ratio = crossed_ratio(below / 2, below, list("abcd"), list("xyxy"))
    assert ratio == (0.5, 0.5, 0.5)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InputError, match="at least one item"):
        crossed_mean([], [], [])
    with pytest.raises(InputError, match="add data"):
        crossed_interval(lambda weights: np.full(len(weights), np.nan), ["a", "b"], ["x", "y"])
    with pytest.raises(InputError, match="clusters"):
        crossed_mean([1.0, 2.0], ["a", "b"], ["x"])
