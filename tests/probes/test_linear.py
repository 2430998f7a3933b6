"""Probes: scikit-learn's own checks, scikit-learn as outside judge, and the batch against one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from casa_mech.errors import InputError, RunError
from probes.linear.estimators import (
    PROBES,
    DifferenceInMeans,
    LdaProbe,
    LogisticProbe,
    RidgeProbe,
    fit_batch,
    load_probe,
    save_probe,
)
from probes.linear.gaussian import ShrunkCovariance, fisher_ratios

SHAPES = [(90, 12), (40, 70)]
ignored = pytest.mark.filterwarnings("ignore")


@ignored
@parametrize_with_checks([kind() for kind in PROBES.values()])
def test_scikit_learn_accepts(estimator: object, check: Callable[[object], None]) -> None:
    check(estimator)


def _data(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.3
    states = rng.standard_normal((n, d)) * rng.uniform(0.1, 30, d) + rng.uniform(-5, 5, d)
    states[:, :3] += y[:, None] * states.std(axis=0)[:3]
    return states, y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighting", ["balanced", None])
@pytest.mark.parametrize("C", [0.01, 10.0])
def test_logistic_is_scikit_learns(shape: tuple[int, int], weighting: str | None, C: float) -> None:
    states, y = _data(*shape)
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight=weighting, tol=1e-10, max_iter=9999))
    found = LogisticProbe(C=C, class_weight=weighting).fit(states, y).decision_function(states)
    np.testing.assert_allclose(found, judge.fit(states, y).decision_function(states), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_scikit_learns(shape: tuple[int, int]) -> None:
    states, y = _data(*shape)
    judge = make_pipeline(StandardScaler(), RidgeClassifier(alpha=3.0, class_weight="balanced")).fit(states, y)
    found = RidgeProbe(alpha=3.0).fit(states, y).decision_function(states)
    np.testing.assert_allclose(found, judge.decision_function(states), atol=1e-6)


def test_lda_is_scikit_learns() -> None:
    states, y = _data(200, 6)
    judge = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.0).fit(states, y)
    found = LdaProbe(shrinkage=0.0, equal_priors=False).fit(states, y)
    np.testing.assert_allclose(found.decision_function(states), judge.decision_function(states), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_shrinkage_is_scikit_learns(shape: tuple[int, int]) -> None:
    residuals = _data(*shape)[0]
    residuals -= residuals.mean(axis=0)
    expected = ledoit_wolf(residuals, assume_centered=True)[0]
    mine = ShrunkCovariance.of(torch.from_numpy(residuals), torch.ones(len(residuals), dtype=torch.float64))
    whole = mine.factor.T @ mine.factor + mine.ridge * torch.eye(shape[1])
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-6, atol=1e-9)
    right = torch.from_numpy(_data(4, shape[1], 1)[0])
    np.testing.assert_allclose(mine.solve(right).numpy(), np.linalg.solve(expected, right.numpy().T).T, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", sorted(PROBES))
def test_batch_is_one_at_a_time(shape: tuple[int, int], kind: str) -> None:
    """Two sites, a fold and a bootstrap resample: each problem is the estimator on its own rows."""
    rng = np.random.default_rng(3)
    sites = np.stack([_data(*shape, seed)[0] for seed in (0, 1)])
    y = _data(*shape)[1]
    counts = np.stack([rng.random(len(y)) < 0.8, rng.multinomial(len(y), np.full(len(y), 1 / len(y)))]).astype(float)
    arrays = (torch.from_numpy(sites), torch.from_numpy(y), torch.from_numpy(counts))
    scores = fit_batch(kind, *arrays, 5.0, tolerance=1e-10).scores(arrays[0]).numpy()
    settings = {"logistic": {"C": 1 / 5.0}, "ridge": {"alpha": 5.0}}.get(kind, {})
    for site in range(2):
        for problem, count in enumerate(counts):
            rows = np.repeat(np.arange(len(y)), count.astype(int))
            alone = PROBES[kind](**settings).fit(sites[site][rows], y[rows])
            expected = alone.decision_function(sites[site])
            np.testing.assert_allclose(scores[site, problem], expected, atol=1e-4 * np.abs(expected).max())


def test_float32_is_enough() -> None:
    states, y = _data(120, 40)
    one = torch.ones(1, 120)
    low = fit_batch("logistic", torch.from_numpy(states[None]).float(), torch.from_numpy(y), one, 10.0)
    high = LogisticProbe(C=0.1).fit(states, y).decision_function(states)
    assert np.corrcoef(low.scores(torch.from_numpy(states[None]).float())[0, 0], high)[0, 1] > 0.9999


def test_mean_difference_points_from_one_mean_to_the_other() -> None:
    states, y = _data(50, 5)
    probe = DifferenceInMeans().fit(states, y)
    gap = states[y].mean(axis=0) - states[~y].mean(axis=0)
    np.testing.assert_allclose(probe.coef_[0], gap)
    halfway = (states[y].mean(axis=0) + states[~y].mean(axis=0)) / 2
    assert abs(probe.decision_function(halfway[None])[0]) < 1e-9 * np.abs(gap).max() ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_ratio_grows_with_the_gap(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    y = torch.arange(shape[0]) % 2 == 0
    noise = torch.from_numpy(rng.standard_normal(shape))
    states = torch.stack([noise + gap * y[:, None] for gap in (0.0, 1.0, 3.0)])
    found = fisher_ratios(states, y[None], torch.ones(1, shape[0], dtype=torch.float64))[:, 0]
    assert torch.isfinite(found).all() and 0 < found[0] < found[1] < found[2]
    one, other = noise[y].numpy(), noise[~y].numpy()
    gap = one.mean(axis=0) - other.mean(axis=0)
    expected = gap @ np.linalg.solve(ledoit_wolf(one)[0] + ledoit_wolf(other)[0], gap)
    np.testing.assert_allclose(float(found[0]), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", sorted(PROBES))
def test_a_saved_probe_comes_back(kind: str, tmp_path: Path) -> None:
    states, y = _data(40, 5)
    probe = PROBES[kind]().fit(states, np.where(y, "harmful", "benign"))
    save_probe(probe, tmp_path / "p.safetensors", {"fingerprint": "abc", "site": "norm"})
    loaded, about = load_probe(tmp_path / "p.safetensors", "abc")
    assert about["site"] == "norm" and loaded.get_params() == probe.get_params()
    np.testing.assert_array_equal(loaded.decision_function(states), probe.decision_function(states))
    assert list(loaded.predict(states)) == list(probe.predict(states))
    with pytest.raises(RunError, match="fitted on another model"):
        load_probe(tmp_path / "p.safetensors", "def")
    (tmp_path / "p.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="not a readable probe"):
        load_probe(tmp_path / "p.safetensors")


def test_bad_states_and_labels_are_named() -> None:
    states, y = torch.zeros(2, 4, 3), torch.tensor([True, True, False, False])
    states[1, 2, 0] = float("nan")
    with pytest.raises(InputError, match="row 2 at site number 1 is not finite"):
        fit_batch("logistic", states, y, torch.ones(1, 4))
    weights = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    with pytest.raises(InputError, match="problem 1 of 2 has one class only"):
        fit_batch("lda", torch.rand(1, 4, 3), y, weights)
    with pytest.raises(ValueError, match="one class"):
        LogisticProbe().fit(np.eye(3), [1, 1, 1])
