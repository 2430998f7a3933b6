"""Nested folds, controls, calibration and the prediction of transfer, on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.timing.probes import AGREEMENT, measure_memory, sklearn_loop
from probes.linear.gate_transfer import POINT_COLUMNS, join_points, transfer_prediction
from probes.linear.validation import (
    auroc_of,
    chance_p,
    cross_validate,
    make_folds,
    matched_auroc,
    permuted_aurocs,
    probe_controls,
)

TOPICS, PER, WIDTH = 24, 5, 12


def _data(gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two sites (the second without any signal), labels, topics."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(TOPICS) % 2 == 0
    topic = np.repeat(np.arange(TOPICS), PER)
    states = rng.standard_normal((2, TOPICS * PER, WIDTH)) + 0.5 * rng.standard_normal((2, TOPICS, WIDTH))[:, topic]
    states[0, :, 0] += gap * harmful[topic]
    return states.astype(np.float32), harmful[topic], topic.astype(str)


def test_folds_keep_topics_whole_and_classes_even() -> None:
    _, labels, topics = _data(1.0)
    splits = make_folds(labels, topics, 5)
    assert all(len(set(splits.fold[topics == topic])) == 1 for topic in set(topics))
    share = [labels[splits.fold == fold].mean() for fold in range(5)]
    assert max(share) - min(share) < 0.25 and np.bincount(splits.fold).min() >= 4 * PER
    for train, inner in zip(splits.training(), splits.inner, strict=True):
        assert not (inner & ~train).any() and (inner.sum(axis=0)[train] == 1).all()
        for held in inner:
            assert not set(topics[held]) & set(topics[train & ~held])


def test_too_little_to_fold_is_named() -> None:
    _, labels, topics = _data(1.0)
    with pytest.raises(InputError, match="5 folds need 5 topics of each class, not 2"):
        make_folds(labels[: 4 * PER], topics[: 4 * PER], 5)
    with pytest.raises(InputError, match="all 10 queries are benign"):
        make_folds(np.zeros(10, dtype=bool), topics[:10])
    states, labels, topics = _data(1.0)
    states[1, 3, 2] = np.nan
    with pytest.raises(InputError, match="row 3 at site number 1 is not finite"):
        cross_validate(states, labels, topics)


def test_nested_cross_validation_is_the_loop() -> None:
    states, labels, topics = _data(1.5)
    (found,) = cross_validate(states, labels, topics)
    expected = sklearn_loop(states, labels, topics)
    for ours, theirs in zip(found.scores, expected, strict=True):
        assert abs(auroc_of(ours, labels) - roc_auc_score(labels, theirs)) <= AGREEMENT
    assert found.penalty.shape == (2, 5)
    assert auroc_of(found.scores[0], labels) > 0.8 > 0.7 > auroc_of(found.scores[1], labels)


@pytest.mark.parametrize("kind", ["ridge", "lda", "mean_difference", "mahalanobis"])
def test_every_kind_is_cross_validated(kind: str) -> None:
    states, labels, topics = _data(3.0)
    found, other = cross_validate(states, labels, topics, kind, others=[(states, topics)])
    assert auroc_of(found.scores[0], labels) > 0.9
    np.testing.assert_allclose(found.scores, other.scores, rtol=1e-4, atol=1e-4)


def test_unseen_topics_are_scored_by_the_whole_fit() -> None:
    states, labels, topics = _data(3.0)
    _, other = cross_validate(states, labels, topics, others=[(states[:, :7], np.full(7, "new"))])
    assert np.isfinite(other.scores).all() and other.scores.shape == (2, 7)


def test_permutations_and_p_values_know_chance() -> None:
    states, labels, topics = _data(2.0)
    chance = permuted_aurocs(states, labels, topics, repeats=30)
    assert abs(chance.mean() - 0.5) < 0.08
    (found,) = cross_validate(states, labels, topics)
    against = probe_controls(found.scores[0], chance[0], labels, np.arange(len(labels)) % 3, topics)
    assert against.p_value == 1 / 31 and against.above_permuted > 0.3
    assert (
        against.low <= against.auroc <= against.high and against.matched_low <= against.matched <= against.matched_high
    )
    assert chance_p(found.scores[0], labels, topics) <= 0.01
    noise = np.random.default_rng(5).standard_normal(len(labels))
    assert chance_p(noise, labels, topics) > 0.02


def test_equal_lengths_unmask_a_probe_that_counts_tokens() -> None:
    rng = np.random.default_rng(0)
    labels, topics = np.arange(200) % 2 == 0, np.arange(200).astype(str)
    lengths = rng.integers(5, 9, 200) + 3 * labels
    assert roc_auc_score(labels, lengths) > 0.9
    value, low, high, pairs = matched_auroc(lengths.astype(float), labels, lengths, topics)
    assert (value, low, high) == (0.5, 0.5, 0.5) and pairs > 0
    assert matched_auroc(lengths, labels, np.arange(200), topics)[3] == 0


def _points(slope: float, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for model in ("a", "b"):
        for site in range(6):
            level = rng.uniform(0.5, 1.0)
            for surface in ("image", "audio"):
                casa = 0.75 + slope * (level - 0.75) + 0.02 * rng.standard_normal()
                rows.append((model, 40, str(site), surface, level, level, level, casa, casa, casa, 60))
    return pd.DataFrame(rows, columns=list(POINT_COLUMNS))


def test_prediction_follows_the_truth() -> None:
    strong, none = transfer_prediction(_points(0.8), 400), transfer_prediction(_points(0.0), 400)
    assert strong.low > 0.5 and strong.within > 0.5 and strong.p_value < 0.01
    assert none.low < 0 < none.high and none.p_value > 0.05
    assert (strong.n, strong.clusters) == (24, 12)
    with pytest.raises(InputError, match="of 3 points says nothing"):
        transfer_prediction(_points(0.8)[:3])
    with pytest.raises(InputError, match="nothing to predict"):
        transfer_prediction(_points(0.8).assign(casa=0.5))


def test_points_join_probe_and_gate() -> None:
    interval = {"auroc": 0.8, "low": 0.7, "high": 0.9, "n": 60}
    probes = pd.DataFrame([{"model": "a", "site": "norm", "fit": fit, "surface": on, **interval} for fit, on in
                           (("text", "text"), ("text", "image"), ("image", "text"))])  # fmt: skip
    gates = pd.DataFrame(
        [{"model": "a", "steps": 8, "site": "norm", "surface": on, **interval} for on in ("text", "image")]
    )
    points = join_points(probes, gates)
    assert list(points["surface"]) == ["image"] and points["casa"].item() == 0.8
    with pytest.raises(InputError, match="no gate reads a layer"):
        join_points(probes, gates.assign(site="0"))


def test_memory_stays_flat(tiny_omni: Omni) -> None:
    found = measure_memory(tiny_omni, batches=40, batch_size=2)
    assert found["batches"] == 40 and found["grown_mb"] <= found["allowed_mb"]
