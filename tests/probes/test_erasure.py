"""LEACE: no linear probe is left, nothing else is taken, and no smaller change would do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import probes
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.trace.standing import standing_edits
from probes.linear import auroc_of, fit_erasure


def _data(n: int = 400, d: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unequal, correlated spread, and classes apart across it."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    states = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + labels[:, None] * rng.standard_normal(d)
    return states + 3.0, labels


def _auroc(states: np.ndarray, labels: np.ndarray) -> float:
    probe = LogisticRegression(C=1e4, max_iter=1000).fit(states, labels)
    return float(auroc_of(probe.decision_function(states), labels))


def test_no_linear_probe_is_left() -> None:
    states, labels = _data()
    erased = fit_erasure(states, labels)(states)
    assert _auroc(states, labels) > 0.75
    np.testing.assert_allclose(erased[labels].mean(axis=0), erased[~labels].mean(axis=0), atol=1e-9)
    probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(erased - erased.mean(axis=0), labels)
    np.testing.assert_allclose(probe.coef_, 0, atol=1e-4)


def test_projecting_the_difference_out_moves_more() -> None:
    """Of all changes that leave the classes one mean, LEACE's is the smallest in squares; this one is another such."""
    states, labels = _data()
    difference = states[labels].mean(axis=0) - states[~labels].mean(axis=0)
    unit = difference / np.linalg.norm(difference)
    projected = states - ((states - states.mean(axis=0)) @ unit)[:, None] * unit
    np.testing.assert_allclose(projected[labels].mean(axis=0), projected[~labels].mean(axis=0), atol=1e-9)
    erased = fit_erasure(states, labels)(states)
    assert np.square(erased - states).sum() < 0.95 * np.square(projected - states).sum()
    rng, optimal = np.random.default_rng(1), np.square(erased - states).sum()
    covariance = np.cov(states.T, bias=True)
    for _ in range(20):  # any oblique projection along the difference is such a change
        reads = rng.standard_normal(len(unit))
        other = states - ((states - states.mean(axis=0)) @ reads)[:, None] * difference / (reads @ difference)
        assert np.square(other - states).sum() >= optimal
    reads = np.linalg.solve(covariance, difference)
    best = states - ((states - states.mean(axis=0)) @ reads)[:, None] * difference / (reads @ difference)
    np.testing.assert_allclose(best, erased, atol=1e-6)


def test_it_is_a_projection_of_rank_one_about_the_mean() -> None:
    states, labels = _data()
    eraser = fit_erasure(states, labels)
    once = eraser(states)
    np.testing.assert_allclose(eraser(once), once, atol=1e-9)
    np.testing.assert_allclose(once.mean(axis=0), states.mean(axis=0), atol=1e-9)
    assert np.linalg.matrix_rank(once - states) == 1
    np.testing.assert_allclose(eraser.reads @ eraser.writes, 1.0)


def test_directions_without_variance_stay() -> None:
    states, labels = _data(n=6, d=20)
    states[:, 5] = 7.0
    erased = fit_erasure(states, labels)(states)
    assert np.isfinite(erased).all() and (np.abs(erased[:, 5] - 7.0) < 1e-9).all()
    np.testing.assert_allclose(erased[labels].mean(axis=0), erased[~labels].mean(axis=0), atol=1e-6)


def test_labels_that_say_nothing_change_nothing() -> None:
    states = np.concatenate([np.eye(4), np.eye(4)])
    np.testing.assert_allclose(fit_erasure(states, [1] * 4 + [0] * 4)(states), states)


def test_the_published_package_agrees() -> None:
    published = pytest.importorskip("concept_erasure")
    states, labels = _data()
    plain = {"shrinkage": False, "constrain_cov_trace": False}
    fitter = published.LeaceFitter.fit(torch.from_numpy(states), torch.from_numpy(labels.astype(np.float64)), **plain)
    expected = fitter.eraser(torch.from_numpy(states)).numpy()
    np.testing.assert_allclose(fit_erasure(states, labels)(states), expected, atol=1e-6)


def test_it_stands_in_a_model(tiny_omni: Omni) -> None:
    texts, labels = ["make tea", "make the cake", "how do i", "what is it ?"], [1, 1, 0, 0]
    states = probes.collect(tiny_omni, texts, [0], "last").at("0")
    eraser = fit_erasure(states, labels)
    with standing_edits(tiny_omni, {0: eraser}):
        below = probes.collect(tiny_omni, texts, ["pre.1"], "last").at("pre.1")
    np.testing.assert_allclose(below, eraser(states), atol=1e-4)


def test_what_cannot_be_erased_is_named() -> None:
    states, labels = _data(n=6)
    with pytest.raises(InputError, match="both classes"):
        fit_erasure(states, [1] * 6)
    with pytest.raises(InputError, match=r"states \[6, 8\] and 5 labels"):
        fit_erasure(states, labels[:5])
    with pytest.raises(InputError, match="not finite"):
        fit_erasure(np.full((2, 2), np.nan), [0, 1])
