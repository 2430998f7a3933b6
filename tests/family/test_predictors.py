"""Predictors: length and direction of the difference of class means, on states whose answer is known."""

import numpy as np
import pytest

from casa_mech.family.predictors import PREDICTOR_COLUMNS, mean_differences, predictor_table
from casa_mech.omni import Omni, load_omni
from casa_mech.organism.premise_rows import READ_SURFACES, SURFACES

TOPICS, EACH, WIDTH = 40, 6, 30


def states(rng: np.random.Generator, shift: np.ndarray, of_topic: float, noise: float = 0.1) -> np.ndarray:
    """States [request, WIDTH] about `TOPICS` topics, the first half harmful and moved by `shift`."""
    topics = of_topic * rng.standard_normal((TOPICS, WIDTH))
    topics[: TOPICS // 2] += shift
    return np.repeat(topics, EACH, axis=0) + noise * rng.standard_normal((TOPICS * EACH, WIDTH))


HARMFUL = np.repeat(np.arange(TOPICS) < TOPICS // 2, EACH)
NAMES = [f"topic{number}" for number in np.repeat(np.arange(TOPICS), EACH)]
FIRST, SECOND = 4 * np.eye(WIDTH)[0], 4 * np.eye(WIDTH)[1]


def test_a_surface_like_text_is_not_shrunk_and_points_the_same_way() -> None:
    text = states(np.random.default_rng(0), FIRST, 0.5)
    differences = mean_differences(text, text, HARMFUL, NAMES)
    assert differences["shrinkage"].value == pytest.approx(1) and differences["cosine"].value == pytest.approx(1)
    # A constant that is the same for all requests, such as that of a modality, is no difference between classes.
    moved = mean_differences(text, text / 4 + 7, HARMFUL, NAMES)
    assert moved["shrinkage"].value == pytest.approx(1 / 4) and moved["cosine"].value == pytest.approx(1)


def test_a_surface_that_parts_the_classes_elsewhere_has_cosine_zero() -> None:
    rng = np.random.default_rng(1)
    # One spread in every feature, so that the scale of text changes no angle.
    text, other = (states(rng, shift, 2.0) for shift in (FIRST, SECOND))
    text, other = text / text.std(axis=0), other / text.std(axis=0)
    cosine = mean_differences(text, other, HARMFUL, NAMES)["cosine"]
    assert abs(cosine.value) < 0.35 and cosine.low < 0 < cosine.high


def test_what_the_drawn_topics_alone_explain_is_taken_off() -> None:
    """On the other surface the same topics are told apart, and harm is not: means differ by chance, not by harm."""
    shrinkages, raw = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        topics = np.repeat(rng.standard_normal((TOPICS, WIDTH)), EACH, axis=0)
        text = topics + HARMFUL[:, None] * FIRST
        differences = mean_differences(text, topics, HARMFUL, NAMES, seed)
        shrinkages.append(differences["shrinkage"].value)
        assert differences["shrinkage"].low == 0
        scaled = [each / text.std(axis=0) for each in (text, topics)]
        lengths = [np.linalg.norm(each[HARMFUL].mean(axis=0) - each[~HARMFUL].mean(axis=0)) for each in scaled]
        raw.append(lengths[1] / lengths[0])
    assert np.median(raw) > 0.4 and np.median(shrinkages) < 0.2


def test_without_a_difference_on_text_there_is_nothing_to_compare() -> None:
    rng = np.random.default_rng(3)
    same = np.tile(rng.standard_normal((EACH, WIDTH)), (TOPICS, 1))
    differences = mean_differences(same, same, HARMFUL, NAMES)
    assert all(np.isnan(estimate.value) for estimate in differences.values())


@pytest.fixture(scope="module")
def organism() -> Omni:
    return load_omni("organism", device="cpu", dtype="float32")


def test_the_card_is_read_and_only_what_it_lacks_is_measured(organism: Omni) -> None:
    row = {"n": 7, "value": 0.5, "low": 0.4, "high": 0.6}
    card = {
        "rows": [{"measure": "attack_success", "surface": "image", "split": "seen", **row}],
        "premises": [
            {"measure": "attack_success", "surface": "image", "split": "seen", **row, "threshold": [0.6, 0.95]},
            {"measure": "names", "surface": "image", "split": "seen", **row, "threshold": [0.95, 1]},
            *(
                {"measure": measure, "surface": surface, "split": "held_out", **row, "threshold": None}
                for measure in ("probe", "probe_from_text")
                for surface in READ_SURFACES
            ),
        ],
    }
    table = predictor_table(organism, card, 60, 0)
    assert tuple(table.columns) == PREDICTOR_COLUMNS
    places = table.set_index(["measure", "surface"])
    assert len(places) == len(places.index.unique()) == 1 + 2 * len(SURFACES) + 2 * len(SURFACES)
    assert places.loc[("probe", "image"), "n"] == 7 and places.loc[("attack_success", "image"), "value"] == 0.5
    # The card has no probe under a jailbreak: fitted here on half of the requests, read on the other half.
    assert places.loc[("probe", "jailbreak"), "n"] == 30 and places.loc[("probe_from_text", "jailbreak"), "value"] > 0.6
    assert places.loc[("cosine", "text"), "value"] == pytest.approx(1)
    assert "names" not in set(table["measure"])
