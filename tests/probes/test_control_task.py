"""Selectivity: a probe that learns topics by heart has none, one that reads harm alone has it all."""

import numpy as np
import pytest

from casa_mech.errors import InputError
from probes.linear.control_task import control_task

TOPICS, EACH = 40, 6
LABELS = np.repeat(np.arange(TOPICS) % 2 == 0, EACH)
NAMES = np.repeat([f"t{number}" for number in range(TOPICS)], EACH)


def test_states_that_name_their_topic_have_no_selectivity() -> None:
    """One-hot topics: any labelling of topics can be learnt by heart, and harm no better than another."""
    one_hot = np.repeat(np.eye(TOPICS), EACH, axis=0)[None]
    result = control_task(one_hot, LABELS, NAMES, penalty=1.0)
    assert result.task == pytest.approx([1.0]) and result.control == pytest.approx(np.ones((1, 5)))
    assert result.selectivity == pytest.approx([0.0]) and result.n == len(LABELS)


def test_states_that_hold_harm_alone_are_selective() -> None:
    noise = np.random.default_rng(0).standard_normal((len(LABELS), 3))
    harm = np.concatenate([np.where(LABELS, 4.0, -4.0)[:, None], 0.5 * noise], axis=1)[None]
    result = control_task(harm, LABELS, NAMES, repeats=20)
    assert result.task == pytest.approx([1.0])
    # All that a control task can use is how many harmful topics it calls harmful.
    assert abs(result.control.mean() - 0.5) < 0.1 and result.selectivity[0] > 0.4


def test_only_topics_that_training_met_are_judged() -> None:
    names = NAMES.astype(object)
    names[:EACH] = [f"alone{number}" for number in range(EACH)]
    result = control_task(np.random.default_rng(1).standard_normal((2, len(LABELS), 4)), LABELS, names)
    assert result.n == len(LABELS) - EACH and result.task.shape == (2,) and result.control.shape == (2, 5)
    with pytest.raises(InputError, match="topics with two requests"):
        control_task(np.zeros((1, 4, 2)), LABELS[:4], np.arange(4).astype(str))


def test_repeated_topics_of_one_class_are_no_task() -> None:
    labels = np.array([True, True, False, False])
    with pytest.raises(InputError, match="topics of both classes"):
        control_task(np.eye(4)[None], labels, np.array(["a", "a", "b", "c"]))
