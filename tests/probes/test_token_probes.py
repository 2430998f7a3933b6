"""Probes of tokens: they find a short passage that a mean drowns."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from casa_mech.errors import InputError
from probes.linear import TOKEN_PROBES, AttentionProbe, LogisticProbe, MaxProbe, auroc_of


def _passages(n: int, seed: int, width: int = 6, longest: int = 40) -> tuple[list[np.ndarray], np.ndarray]:
    """Long prompts of noise; in the harmful ones a single token, anywhere, is far along the first axis."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 0
    prompts = [rng.standard_normal((rng.integers(longest // 2, longest), width)) for _ in range(n)]
    for tokens, harmful in zip(prompts, labels, strict=True):
        if harmful:
            tokens[rng.integers(len(tokens)), 0] += 6.0
    return prompts, labels


@pytest.mark.parametrize("kind", sorted(TOKEN_PROBES))
def test_one_token_is_found_that_the_mean_drowns(kind: str) -> None:
    prompts, labels = _passages(120, 0)
    unseen, truth = _passages(120, 1)
    mean = LogisticProbe().fit(np.stack([tokens.mean(axis=0) for tokens in prompts]), labels)
    drowned = auroc_of(mean.decision_function(np.stack([tokens.mean(axis=0) for tokens in unseen])), truth)
    probe = TOKEN_PROBES[kind](C=1.0).fit(prompts, labels)
    assert auroc_of(probe.decision_function(unseen), truth) > max(0.95, drowned + 0.1)
    assert (probe.predict(unseen) == truth).mean() > 0.85


@pytest.mark.parametrize("kind", sorted(TOKEN_PROBES))
def test_order_and_company_make_no_difference(kind: str) -> None:
    prompts, labels = _passages(40, 0)
    probe = TOKEN_PROBES[kind]().fit(prompts, labels)
    scores = probe.decision_function(prompts)
    np.testing.assert_allclose(probe.decision_function([prompts[3][::-1]]), scores[3:4])
    np.testing.assert_allclose(np.concatenate([probe.decision_function([one]) for one in prompts]), scores)


def test_a_known_answer() -> None:
    """Scores 1 and 3, keys 0 and log 3: the softmax weighs them 1 to 3."""
    tokens = [np.array([[1.0, 0.0], [3.0, np.log(3)]])]
    for probe, expected in ((AttentionProbe(), 0.25 * 1 + 0.75 * 3), (MaxProbe(), 3.0)):
        probe.classes_, probe.coef_, probe.query_ = np.array([0, 1]), np.array([[1.0, 0]]), np.array([[0.0, 1]])
        probe.intercept_ = np.array([0.0])
        np.testing.assert_allclose(probe.decision_function(tokens), expected)


@pytest.mark.parametrize("kind", sorted(TOKEN_PROBES))
def test_prompts_of_one_token_are_a_linear_probe(kind: str) -> None:
    rng = np.random.default_rng(0)
    states, labels = rng.standard_normal((60, 4)), np.arange(60) % 2 == 0
    states[labels] += 0.7
    scaled = (states - states.mean(axis=0)) / states.std(axis=0)
    judge = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-8).fit(scaled, labels)
    probe = TOKEN_PROBES[kind](C=0.5).fit([row[None] for row in states], labels)
    expected = judge.decision_function(scaled)
    np.testing.assert_allclose(probe.decision_function([row[None] for row in states]), expected, atol=1e-3)


def test_what_cannot_be_fitted_is_named() -> None:
    with pytest.raises(InputError, match="two classes, not 1"):
        MaxProbe().fit([np.ones((2, 3))], [1])
    with pytest.raises(InputError, match="prompt number 1 has no tokens"):
        MaxProbe().fit([np.ones((2, 3)), np.ones((0, 3))], [1, 0])
