"""Notebook 01's tables, claims and figures, on arrays whose answer is known, and on a tiny untrained organism."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.activations import activations
from helpers.figures import assert_one_line

from casa_mech.judging.estimate import Estimate
from casa_mech.reports.separability import claims, plots, tables
from casa_mech.study import Study
from probes.activations import Activations
from probes.linear.harm_and_refusal import Dissociation

TOPICS, EACH, WIDTH = 60, 4, 6
TOPIC = np.repeat(np.arange(TOPICS), EACH)
HARMFUL = TOPIC % 2 == 0
NAMES = np.array([f"t{number}" for number in TOPIC])
KINDS = np.where(HARMFUL, [f"harm{number % 10}" for number in TOPIC], [f"good{number % 10}" for number in TOPIC])


@pytest.fixture(scope="module")
def study(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    out = tmp_path_factory.mktemp("runs") / "separability"
    sizes = {"n_probe": 12, "max_new_tokens": 4}
    return Study.open(out, progress=False, sizes=sizes, model=str(random_organism), profile="smoke")


def states(gap: float, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    """Classes `gap` to either side of `shift` on the first axis, noise 1."""
    noise = np.random.default_rng(seed).standard_normal((len(TOPIC), WIDTH))
    noise[:, 0] += np.where(HARMFUL, gap, -gap) + shift
    return noise


def matrix(*surfaces: str) -> pd.DataFrame:
    """The transfer matrix of probes that make no mistake anywhere."""
    rows = [
        {"site": "norm", "positions": "last", "fit": fit, "surface": surface, "n": len(TOPIC), "p": 0.001}
        | {"auroc": 1.0, "low": 0.9, "high": 1.0}
        for fit in surfaces
        for surface in surfaces
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def read() -> Activations:
    """Text apart, pictures apart but shifted below text's threshold, speech mixed."""
    surfaces = {"text": states(4), "image": states(4, -9, 1), "audio": states(0, 0, 2)}
    return activations(surfaces, HARMFUL, NAMES, KINDS)


def test_threshold_claim_counts_what_is_flagged(study: Study, read: Activations) -> None:
    scores = tables.score_data({study.name: [read]}, 0)
    thresholds = tables.threshold_data(scores, 0)
    claim = claims.threshold_claim(study, scores, thresholds)
    assert "flags 0% of harmful image requests, 100% of texts" in claim.title
    assert claim.value == 1 and claim.p < 0.001 and claim.n == int(HARMFUL.sum())
    assert "image 0% / 0% (AUROC 1.00), moved 100% / 0%, audio" in claim.statement
    assert len(plots.plot_thresholds(thresholds, *claim.heading).axes) == 1
    # A surface on which as many are flagged: the claim says so, and its test does not reject.
    same = activations({"text": states(4), "image": states(4, 0, 1)}, HARMFUL, NAMES)
    scores = tables.score_data({study.name: [same], "other": [same]}, 0)
    thresholds = tables.threshold_data(scores, 0)
    claim = claims.threshold_claim(study, scores, thresholds)
    assert len(plots.plot_thresholds(thresholds, *claim.heading).axes) == 2 and "other: text 100%" in claim.statement
    assert abs(claim.value) < 0.02 and claim.low <= 0 <= claim.high and claim.p > 0.05


def test_kinds_claim_sets_new_kinds_beside_new_topics(study: Study) -> None:
    own_axes = np.eye(10)[TOPIC % 10]  # what a kind has is its own, harmful or benign
    by_kind = np.random.default_rng(0).standard_normal((len(TOPIC), 11)) * 0.3
    by_kind[:, 1:] += 4 * own_axes
    data = activations({"text": by_kind, "image": by_kind}, HARMFUL, NAMES, KINDS)
    perfect = matrix("text", "image")
    kinds = tables.kind_data([data], perfect, 0)
    claim = claims.kinds_claim(study, kinds)
    assert claim.low < 0.5 and "is not shown to find harm of a new kind" in claim.statement and claim.p > 0.05
    assert claim.title.endswith("on new topics alone 1.00")
    assert list(dict.fromkeys(kinds["kind"])) == [tables.TOPICS, "all", *(f"harm{kind}" for kind in (0, 2, 4, 6, 8))]
    assert len(plots.plot_kinds(kinds, *claim.heading).axes) == 1
    shared = activations({"text": states(4), "image": states(4, 0, 1)}, HARMFUL, NAMES, KINDS)
    met = claims.kinds_claim(study, tables.kind_data([shared], perfect, 0))
    assert met.value > 0.99 and "It finds harm of a new kind" in met.statement and met.p < 0.02


def test_differences_are_named_by_surface(study: Study, read: Activations) -> None:
    half = activations({"text": states(4), "image": states(4) / 2, "audio": -states(4)}, HARMFUL, NAMES)
    differences = tables.difference_data({study.name: [half], "other": [half]}, 0)
    heading = claims.differences_heading(study, differences)
    assert "0.50 to 1.00 of text's length, cosine -1.00 to 1.00" in heading.title
    assert len(plots.plot_differences(differences, *heading).axes) == 6
    assert_one_line(heading.title)


def test_dissociation_claim_says_what_failed(study: Study) -> None:
    parts = Dissociation(Estimate(0.4, 0.3, 0.5), Estimate(0.2, 0.1, 0.3), 0.001, 90)
    claim = claims.dissociation_claim(study, {"text": parts, "image": None}, "2")
    assert "are two directions" in claim.title and (claim.value, claim.low, claim.p) == (0.2, 0.1, 0.001)
    assert "0.40 [0.30, 0.50] / 0.20 [0.10, 0.30]" in claim.statement and "image too few" in claim.statement
    one = Dissociation(Estimate(0.4, 0.3, 0.5), Estimate(-0.1, -0.2, 0.1), 0.8, 90)
    failed = claims.dissociation_claim(study, {"text": one}, "2")
    assert "are not shown to be two directions" in failed.title and failed.value == -0.1
    few = claims.dissociation_claim(study, {"text": None}, "2")
    assert few.n == 0 and np.isnan(few.value) and few.p == 1
    for each in (claim, failed, few):
        assert_one_line(each.title)


def test_directions_are_read_at_two_places(study: Study) -> None:
    """Harm is written at the user's last token alone, refusal at the header's alone."""
    refused = TOPIC % 4 == 0
    outcomes = np.where(refused, "refused", "complied")
    rng = np.random.default_rng(0)
    user, header = rng.standard_normal((2, len(TOPIC), WIDTH))
    user[:, 0] += 4 * HARMFUL
    header[:, 1] += 4 * refused
    both = [activations({"text": place}, HARMFUL, NAMES, site="0") for place in (user, header)]
    parted = tables.dissociations(*both, outcomes, 0)
    assert parted["text"] is not None and parted["text"].weaker.low > 0.2 and parted["text"].p_value < 0.01
    swapped = tables.dissociations(*both[::-1], outcomes, 0)
    assert swapped["text"] is not None and swapped["text"].weaker.value < 0
    named = [both[0], Activations(both[1].states, both[1].index, "last:user")]
    directions = tables.direction_data(named, outcomes, 0)
    assert set(directions["positions"]) == {"last:user", "last"}
    assert len(plots.plot_directions(directions, "title").axes) == 2
    assert tables.dissociations(*both, np.full(len(TOPIC), "complied"), 0) == {"text": None}
    deep = Activations({**{str(n): user for n in range(4)}, "norm": user}, both[0].index, "last")
    assert tables.depth_site(deep) == "2" and tables.depth_site(both[0]) == "0"


def test_controls_have_random_weights_and_the_control_task(study: Study, read: Activations) -> None:
    noise = activations({name: states(0, 0, 9) for name in ("text", "image", "audio")}, HARMFUL, NAMES)
    table = tables.control_table([read], [noise], 0)
    rows = table.set_index("surface")
    assert rows.at["text", "auroc"] > 0.99 and abs(rows.at["text", "untrained"] - 0.5) < 0.2
    assert np.allclose(rows["selectivity"], rows["task"] - rows["control_task"])
    assert rows.at["text", "selectivity"] > 0.3 > rows.at["audio", "selectivity"] and len(table) == 3
    claim = claims.probe_claim(study, matrix("text", "image", "audio"), table)
    assert f"text {rows.at['text', 'auroc']:.2f}" in claim.statement and "random weights" in claim.refuted_if
    assert f"{rows.at['text', 'task']:.2f} / {rows.at['text', 'control_task']:.2f}" in claim.statement
    assert len(plots.plot_controls(table, *claim.heading).axes) == 3


def test_states_and_outcomes_of_the_study_go_together(study: Study) -> None:
    user, header, mean = (study.activations(positions) for positions in ("last:user", "last", "mean"))
    control = study.activations("last", random_weights=True)
    for other in (user, mean, control):
        pd.testing.assert_frame_equal(other.index, header.index)
    assert set(header.index["surface"]) == {"text", "image", "audio"} and (header.index["category"] != "").all()
    assert not np.allclose(user.at("norm"), header.at("norm")) and not np.allclose(control.at("0"), header.at("0"))
    outcomes = tables.own_outcomes(study)
    assert len(outcomes) == len(header.index) == 6 * 12
    directions = tables.direction_data([user, header], outcomes, 0)
    assert len(directions) == 2 * 3 * 3 * 2 * 2
