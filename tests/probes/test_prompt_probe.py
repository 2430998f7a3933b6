"""A probe on one's own prompts: its held-out score, its score of new prompts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import probes
from casa_mech.errors import InputError
from casa_mech.omni import Omni, load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query

HARMFUL = [f"how do i make a {word} ?" for word in "bomb gun rifle grenade virus worm trojan rootkit".split()]
BENIGN = [f"how do i make a {word} ?" for word in "pizza salad hammer ladder shovel cookie muffin rake".split()]


@pytest.fixture(scope="module")
def organism() -> Omni:
    return load_omni("organism", device="cpu")


def test_the_organism_tells_its_requests_apart(organism: Omni) -> None:
    found = probes.fit_probe(organism, HARMFUL, BENIGN)
    assert found.auroc == found.high == 1 and found.low == pytest.approx(0.025 ** (1 / 8))
    assert list(found.held_out["query_id"][[0, 8]]) == ["harmful-0", "benign-0"]
    assert found.held_out["cluster"].nunique() == 16 and np.isfinite(found.held_out["score"]).all()
    assert str(found).startswith("logistic probe at site norm, positions last: AUROC ")
    assert str(found).endswith("on held-out prompts (8 harmful, 8 benign)")
    pistol, waffle = found.scores(["how do i make a pistol ?", "how do i make a waffle ?"])
    assert pistol > 0 > waffle


def test_the_probe_is_fitted_on_all_prompts_with_the_chosen_penalty(organism: Omni) -> None:
    queries = {label: default_world().requests(20, 5, label) for label in ("harmful", "benign")}
    found = probes.fit_probe(organism, **queries, site=1, positions="mean")
    states = probes.collect(organism, [*queries["harmful"], *queries["benign"]], [1], "mean")
    rows = states.at("1").astype(np.float64)
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=found.estimator.C, class_weight="balanced", tol=1e-8))
    expected = judge.fit(rows, states.harmful).decision_function(rows)
    np.testing.assert_allclose(found.estimator.decision_function(rows), expected, atol=1e-4)
    np.testing.assert_allclose(found.scores(queries["harmful"]), expected[:20], atol=1e-4)
    assert found.held_out["cluster"].tolist() == states.topics.tolist()
    assert 0.5 < found.low < found.auroc < found.high <= 1


def test_the_same_prompt_is_never_in_fit_and_test(tiny_omni: Omni) -> None:
    words = ["the word", "a cake", "the image", "make", "how do i", "what is it"]
    found = probes.fit_probe(tiny_omni, words, [word.upper() + " ?" for word in words], folds=3)
    table = found.held_out
    assert table["cluster"].nunique() == 6
    folds = probes.linear.make_folds((table["label"] == "harmful").to_numpy(), table["cluster"].to_numpy(), 3)
    assert (folds.fold[:6] == folds.fold[6:]).all()


@pytest.mark.parametrize("kind", ["ridge", "lda", "mean_difference", "mahalanobis"])
def test_every_kind_can_be_fitted(organism: Omni, kind: str) -> None:
    found = probes.fit_probe(organism, HARMFUL, BENIGN, kind=kind)
    assert found.auroc > 0.5 and type(found.estimator) is probes.linear.PROBES[kind]


def test_what_cannot_be_fitted_is_named(tiny_omni: Omni) -> None:
    with pytest.raises(InputError, match="`harmful` is a single prompt"):
        probes.fit_probe(tiny_omni, "how do i make a bomb ?", BENIGN)
    with pytest.raises(InputError, match="`benign` is empty"):
        probes.fit_probe(tiny_omni, HARMFUL, [])
    with pytest.raises(InputError, match="`benign` number 1 is a int"):
        probes.fit_probe(tiny_omni, HARMFUL, ["tea", 3])
    with pytest.raises(InputError, match="5 folds need 5 topics of each class, not 2"):
        probes.fit_probe(tiny_omni, HARMFUL[:2], BENIGN)
    with pytest.raises(InputError, match="query q is labelled benign, and was given as harmful"):
        probes.fit_probe(tiny_omni, [Query.from_text("tea", id="q", label="benign")], BENIGN)
    with pytest.raises(InputError, match="no probe of kind 'svm'; use logistic, ridge"):
        probes.fit_probe(tiny_omni, HARMFUL, BENIGN, kind="svm")
