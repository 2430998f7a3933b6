"""Harmfulness and refusal as separate directions: states in which one, the other or both are written."""

import numpy as np
import pytest
from helpers.activations import activations

from casa_mech.errors import InputError
from probes.linear.harm_and_refusal import (
    HARM,
    REFUSAL,
    auroc_advantage,
    contrasts,
    direction_table,
    double_dissociation,
    held_out_coordinates,
    swap_test,
)

TOPICS, EACH, WIDTH = 48, 4, 8
TOPIC = np.repeat(np.arange(TOPICS), EACH)
NAMES = np.array([f"t{number}" for number in TOPIC])
HARMFUL = TOPIC % 2 == 0
# Every other harmful topic is refused; one benign topic, too, which is in no group.
REFUSED = (TOPIC % 4 == 0) | (TOPIC == 1)
OUTCOMES = np.where(REFUSED, "refused", "complied")


def written(harm: float, refusal: float, seed: int = 0) -> np.ndarray:
    """States with `harm` on the first axis and `refusal` on the second, noise of requests and topics 1."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((len(TOPIC), WIDTH)) + 0.5 * rng.standard_normal((TOPICS, WIDTH))[TOPIC]
    states[:, 0] += harm * HARMFUL
    states[:, 1] += refusal * REFUSED
    return states


def test_groups_hold_the_other_thing_fixed() -> None:
    outcomes = OUTCOMES.copy()
    outcomes[TOPIC == 2] = "incoherent"
    groups = contrasts(HARMFUL, outcomes)
    answered = (TOPIC % 4 == 2) & (TOPIC != 2)
    assert np.array_equal(groups[HARM][0], answered) and np.array_equal(groups[REFUSAL][1], answered)
    assert np.array_equal(groups[HARM][1], ~HARMFUL & (TOPIC != 1))
    assert np.array_equal(groups[REFUSAL][0], TOPIC % 4 == 0)


def test_coordinates_are_those_of_directions_from_the_other_topics() -> None:
    """Three topics of two requests: worked out by hand, one axis."""
    states = np.array([[4.0], [6.0], [1.0], [1.0], [-1.0], [-3.0]])
    topics = np.array(["a", "a", "b", "b", "c", "c"])
    first = np.array([True, True, True, True, False, False])
    with_two = (first, np.array([False, False, False, False, True, True]))
    assert np.isnan(held_out_coordinates(states, with_two, topics)).all()  # the second group is one topic
    topics = np.array(["a", "a", "b", "b", "c", "d"])
    # Without a: means 1 and -2, middle -0.5. Without c: means 3 and -3, middle 0. Without d: means 3 and -1, middle 1.
    expected = [4.5, 6.5, 1 - 1.5, 1 - 1.5, -1.0, -4.0]
    np.testing.assert_allclose(held_out_coordinates(states, with_two, topics), expected)


def test_noise_is_at_chance_in_many_dimensions() -> None:
    """Taking a topic out of its mean must not push its score to the other side."""
    values = []
    for seed in range(20):
        states = np.random.default_rng(seed).standard_normal((TOPICS, 200))[TOPIC]
        positive, negative = contrasts(HARMFUL, OUTCOMES)[HARM]
        scores = held_out_coordinates(states, (positive, negative), NAMES)
        values.append((scores[positive][:, None] > scores[negative][None]).mean())
    assert abs(np.mean(values) - 0.5) < 0.06


def test_each_direction_reads_its_own_contrast() -> None:
    data = activations({"text": written(4, 4), "image": written(4, 0)}, HARMFUL, NAMES)
    table = direction_table(data, np.tile(OUTCOMES, 2))
    cells = table.set_index(["surface", "direction", "contrast"])
    for own, other in ((HARM, REFUSAL), (REFUSAL, HARM)):
        assert cells.loc[("text", own, own), "auroc"] > 0.95
        assert abs(cells.loc[("text", own, other), "auroc"] - 0.5) < 0.25
    assert cells.loc[("image", HARM, HARM), "auroc"] > 0.95
    assert abs(cells.loc[("image", REFUSAL, REFUSAL), "auroc"] - 0.5) < 0.3
    assert cells.loc[("text", HARM, HARM), "n"] == 48 + 92 and cells.loc[("text", HARM, HARM), "positive"] == 48
    # No reply was a refusal: nothing to compare, and nothing raised.
    none = direction_table(activations({"text": written(4, 4)}, HARMFUL, NAMES), np.full(len(TOPIC), "complied"))
    assert none.set_index(["direction", "contrast"])["auroc"].isna().to_dict() == {
        (HARM, HARM): False, (HARM, REFUSAL): True, (REFUSAL, HARM): True, (REFUSAL, REFUSAL): True,
    }  # fmt: skip


def test_a_double_dissociation_needs_both() -> None:
    groups = contrasts(HARMFUL, OUTCOMES)

    def of(states: np.ndarray) -> dict[str, np.ndarray]:
        return {name: held_out_coordinates(states, groups[name], NAMES) for name in (HARM, REFUSAL)}

    both = double_dissociation(of(written(4, 4)), groups, NAMES)
    assert both.harm.low > 0.1 and both.refusal.low > 0.1 and both.p_value <= 0.002
    assert both.weaker == min(both.harm, both.refusal) and both.n == 48 + 48 + 92
    # One axis alone for both: a request is refused as far as it is harmful.
    one = written(0, 0)
    one[:, 0] += 3.0 * HARMFUL + 3.0 * (HARMFUL & REFUSED)
    neither = double_dissociation(of(one), groups, NAMES)
    assert neither.p_value > 0.05 and neither.weaker.low < 0
    with pytest.raises(InputError, match="fewer than two topics"):
        double_dissociation(of(written(4, 4)) | {HARM: np.full(len(TOPIC), np.nan)}, groups, NAMES)


def test_advantage_is_the_difference_of_aurocs() -> None:
    labels = np.array([True, True, False, False])
    first, second = np.array([2.0, 3.0, 1.0, 0.0]), np.array([2.0, 0.0, 1.0, 0.0])
    # Pairs won: 4 of 4, and 2 + 1/2 (a tie) of 4.
    advantage = auroc_advantage(first, second, labels, ["a", "b", "c", "d"])
    assert advantage.value == pytest.approx(1 - 2.5 / 4) and advantage.low >= 0
    # The wrong way round is read all the same.
    assert auroc_advantage(first, -first, labels, ["a", "b", "c", "d"]).value == 0


def test_swap_test_keeps_its_level() -> None:
    """Two rankings of equal worth, alike within topics: p below .05 in about 5 % of 300 sets (binomial bounds)."""
    labels, topics = np.repeat(np.arange(20) % 2 == 0, 3), np.repeat(np.arange(20), 3)
    below = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        first, second = (labels + rng.standard_normal(20)[topics] + 0.3 * rng.standard_normal(60) for _ in range(2))
        below += swap_test(first, second, labels, topics, seed, draws=199) <= 0.05
    assert 4 <= below <= 28  # 99.9 % of Binomial(300, 0.05)
    assert swap_test(np.where(labels, 1.0, 0.0), np.random.default_rng(0).standard_normal(60), labels, topics) <= 0.01
