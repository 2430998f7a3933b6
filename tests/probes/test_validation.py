"""Nested folds, controls, calibration and the prediction of transfer, on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.timing.probes import AGREEMENT, measure_memory, sklearn_loop
from probes.linear.gate_transfer import POINT_COLUMNS, join_points, transfer_prediction
from probes.linear.validation import (
    Rows,
    auroc_of,
    chance_of,
    chance_p,
    cross_validate,
    make_folds,
    matched_auroc,
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


def rows_of(states: np.ndarray, labels: np.ndarray, topics: np.ndarray) -> Rows:
    return Rows(states, labels, topics, np.arange(len(labels)).astype(str))


def test_permutations_and_p_values_know_chance() -> None:
    states, labels, topics = _data(2.0)
    (chance,) = chance_of(rows_of(states, labels, topics), deals=39)
    assert abs(chance.aurocs.mean() - 0.5) < 0.08 and (chance.band[0] < 0.5).all() and (chance.band[1] > 0.5).all()
    assert chance.p_value[0] == 1 / 40 and chance.p_value[1] > 0.05, "the second site holds nothing"
    (own,) = cross_validate(states, labels, topics)
    lengths = np.arange(len(labels)) % 3
    against = probe_controls(own.scores[0], chance.aurocs[0], chance.p_value[0], labels, lengths, topics)
    assert against.p_value == 1 / 40 and against.above_permuted > 0.3
    assert (
        against.low <= against.auroc <= against.high and against.matched_low <= against.matched <= against.matched_high
    )


def noise_rows(rng: np.random.Generator, mixed: bool, topics: int = 12, per: int = 3, width: int = 4) -> Rows:
    """States without a signal that share what their topic has, under one label a topic or both in each."""
    topic = np.repeat(np.arange(topics), per)
    labels = topic % 2 == 0
    if mixed:
        labels = np.concatenate([rng.permutation(np.arange(per) == 0) for _ in range(topics)])
    states = rng.normal(size=(1, topics * per, width)) + rng.normal(size=(1, topics, width))[:, topic]
    return rows_of(states.astype(np.float32), labels, topic.astype(str))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_probe_on_noise_is_found_as_often_as_the_test_says(mixed: bool) -> None:
    """Own surface and one that it is carried to, whose states hold the same chance: 5 % of 200, binomial 99.9 %."""
    rng, own, carried = np.random.default_rng(6), [], []
    for seed in range(200):
        rows = noise_rows(rng, mixed)
        rendered = rows.states + rng.normal(size=rows.states.shape).astype(np.float32)
        other = Rows(rendered, rows.labels, rows.clusters, rows.units)
        first, second = chance_of(rows, [other], deals=39, folds=3, seed=seed)
        own.append(first.p_value[0])
        carried.append(second.p_value[0])
    for p_values in (own, carried):
        assert 1 <= np.sum(np.array(p_values) <= 0.05) <= stats.binom.ppf(0.9995, 200, 0.05)


@pytest.mark.parametrize("mixed", [False, True])
def test_scores_without_a_fit_are_found_as_often_as_the_test_says(mixed: bool) -> None:
    rng, p_values = np.random.default_rng(7), []
    for seed in range(300):
        rows = noise_rows(rng, mixed)
        p_values.append(chance_p(rows.states[0, :, 0], rows.labels, rows.clusters, seed, 99))
    least, most = stats.binom.ppf([0.0005, 0.9995], 300, 0.05)
    assert least <= np.sum(np.array(p_values) <= 0.05) <= most


def test_a_unit_keeps_its_label_wherever_it_is_judged() -> None:
    """The same states as another surface's, in another order and with a topic of its own: dealt the same labels."""
    rng = np.random.default_rng(8)
    rows = noise_rows(rng, mixed=True)
    order = rng.permutation(len(rows.labels))
    again = Rows(rows.states[:, order], rows.labels[order], rows.clusters[order], rows.units[order])
    first, second = chance_of(rows, [again], deals=19, folds=3)
    np.testing.assert_allclose(first.aurocs, second.aurocs)
    new = Rows(rows.states[:, :6], np.arange(6) < 3, np.repeat(["new", "newer"], 3), np.array(list("abcdef")))
    _, third = chance_of(rows, [new], deals=19, folds=3)
    assert np.isfinite(third.aurocs).all() and set(np.round(third.aurocs.ravel() * 9, 6)) <= set(range(10))


def test_equal_lengths_unmask_a_probe_that_counts_tokens() -> None:
    rng = np.random.default_rng(0)
    labels, topics = np.arange(200) % 2 == 0, np.arange(200).astype(str)
    lengths = rng.integers(5, 9, 200) + 3 * labels
    assert roc_auc_score(labels, lengths) > 0.9
    value, low, high, pairs = matched_auroc(lengths.astype(float), labels, lengths, topics)
    assert (value, low, high) == (0.5, 0.5, 0.5) and pairs > 0
    assert matched_auroc(lengths, labels, np.arange(200.0), topics)[3] == 0
    perfect, low, high, _ = matched_auroc(labels.astype(float), labels, np.zeros(200), topics)
    assert (perfect, high) == (1.0, 1.0) and low == pytest.approx(0.025 ** (1 / 100)), "a hundred pairs are not certain"


def test_a_length_that_is_not_known_is_missing_and_passes_nothing() -> None:
    """Unknown lengths as 0 would be one length that all share, and its AUROC 1/2: a control that is passed."""
    states, labels, topics = _data(2.0)
    (own,) = cross_validate(states, labels, topics)
    chance = np.array([0.4, 0.5, 0.6])
    unknown = np.full(len(labels), np.nan)
    none = probe_controls(own.scores[0], chance, 0.25, labels, unknown, topics)
    assert none.lengths_missing == len(labels) and none.pairs == 0
    assert all(np.isnan(value) for value in (none.length, none.length_low, none.matched, none.matched_high))
    half = np.where(np.arange(len(labels)) % 2 == 0, np.where(labels, 7.0, 5.0), np.nan)
    known = probe_controls(own.scores[0], chance, 0.25, labels, half, topics)
    assert known.lengths_missing == len(labels) // 2 and known.length == 1.0, "of those that are known"
    assert np.isnan(known.matched) and known.pairs == 0, "no two classes share a known length"


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
    assert strong.low > 0.5 and strong.within > 0.5 and strong.p_value < 0.01 and strong.within_p < 0.01
    assert none.low < 0 < none.high and none.p_value > 0.05 and none.within_p > 0.05
    assert (strong.n, strong.clusters) == (24, 12)
    assert {model: gates for model, (_, _, gates) in strong.by_model.items()} == {"a": 6, "b": 6}
    assert all(value > 0.5 and p < 0.05 for value, p, _ in strong.by_model.values())
    with pytest.raises(InputError, match="of 3 points says nothing"):
        transfer_prediction(_points(0.8)[:3])
    with pytest.raises(InputError, match="nothing to predict"):
        transfer_prediction(_points(0.8).assign(casa=0.5))


def test_surfaces_of_one_gate_are_one_draw() -> None:
    """Four gates of one model, ranked alike on both surfaces: 2 of the 24 orders of gates are as extreme."""
    level = {"0": 0.6, "1": 0.7, "2": 0.8, "3": 0.9}
    rows = [("a", 40, site, surface, value + off, 0, 0, value, 0, 0, 60)
            for site, value in level.items() for surface, off in (("image", 0.0), ("audio", 0.001))]  # fmt: skip
    prediction = transfer_prediction(pd.DataFrame(rows, columns=list(POINT_COLUMNS)), 4000)
    assert prediction.spearman > 0.95 and prediction.p_value == pytest.approx(2 / 24, abs=0.02)


def test_what_a_model_s_gates_have_in_common_is_no_evidence() -> None:
    """One model is better on both sides and nothing else is related: pooled points correlate, its gates do not."""
    rng = np.random.default_rng(9)
    points = _points(0.0).assign(probe=rng.uniform(0.5, 0.6, 24), casa=rng.uniform(0.5, 0.6, 24))
    points.loc[points["model"] == "b", ["probe", "casa"]] += 0.3
    prediction = transfer_prediction(points, 400)
    assert prediction.spearman > 0.5 and prediction.p_value > 0.05 and prediction.within_p > 0.05


def test_gates_without_a_relation_are_found_as_often_as_the_test_says() -> None:
    rng, pooled, within = np.random.default_rng(10), [], []
    for seed in range(200):
        points = _points(0.0, seed)
        gates = rng.normal(size=12)[np.repeat(np.arange(12), 2)]  # what a gate is good for, on either surface
        prediction = transfer_prediction(points.assign(casa=gates + 0.1 * rng.normal(size=24)), 99, seed)
        pooled.append(prediction.p_value)
        within.append(prediction.within_p)
    least, most = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    for p_values in (pooled, within):
        assert least <= np.sum(np.array(p_values) <= 0.05) <= most


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
