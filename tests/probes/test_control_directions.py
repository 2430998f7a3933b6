"""Controls of an ablation: as much variance as the direction has, and labels that say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from casa_mech.errors import InputError
from probes.linear.control_directions import equal_variance_directions, permuted_differences


def test_states_vary_along_the_controls_as_along_the_direction() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([10.0, 3.0, 1.0, 0.3, 0.1, 0.0])
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    states = rng.standard_normal((500, 6)) * scales @ rotation.T + 5
    for axis in (0, 1, 3):
        direction = 7 * rotation[:, axis] + (0.5 * rotation[:, 2] if axis else 0)
        controls = equal_variance_directions(states, direction, 40, rng)
        np.testing.assert_allclose(np.linalg.norm(controls, axis=1), 1)
        aim = (states @ direction / np.linalg.norm(direction)).var()
        np.testing.assert_allclose((states @ controls.T).var(axis=0), aim, rtol=1e-3)
    # Where there is room they point anywhere: no axis is left out, and each sign comes as often.
    assert (np.abs(controls @ rotation)[:, 1:5].max(axis=0) > 0.1).all()
    assert 0.3 < (controls @ rotation[:, 2] > 0).mean() < 0.7
    plain = rng.standard_normal((20, 6))
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.median((states @ plain.T).var(axis=0)) > 3 * aim  # what a plain random direction would have taken away


def test_a_direction_that_does_not_fit_is_refused() -> None:
    states = np.zeros((5, 3))
    for wrong in (np.ones(4), np.zeros(3)):
        with pytest.raises(InputError, match="give at least two states"):
            equal_variance_directions(states, wrong, 2, np.random.default_rng(0))


def test_labels_are_dealt_to_whole_topics() -> None:
    """Four topics of two states: the only differences are those of two topics against the two others."""
    values = np.array([0.0, 1.0, 10.0, 100.0])
    states, topics = np.repeat(values, 2)[:, None], np.repeat(["a", "b", "c", "d"], 2).tolist()
    harmful = np.repeat([True, True, False, False], 2)
    differences = permuted_differences(states, harmful, topics, 300, np.random.default_rng(0))
    possible = {54.5, 45.5, 44.5}
    assert {abs(round(float(value), 6)) for value in differences[:, 0]} == possible
