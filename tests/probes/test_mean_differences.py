"""Length and direction of the difference of class means, on states whose answer is known."""

import numpy as np
import pytest
from helpers.activations import activations

from casa_mech.errors import InputError
from probes.linear.mean_differences import MEASURES, mean_difference_table, mean_differences

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


def test_length_is_in_spreads_of_text_and_does_not_grow_with_the_width() -> None:
    """Two topics a class, no noise: the classes lie at +1 and -1 in the first half of the features, at 0 elsewhere."""
    sign = np.repeat([1.0, 1.0, -1.0, -1.0], 5)
    harmful, topics = sign > 0, [f"t{number // 5}" for number in range(20)]
    for width in (4, 40):
        half = np.concatenate([np.outer(sign, np.ones(width // 2)), np.zeros((20, width // 2))], axis=1)
        # The spread of +-1 is 1 and the means are 2 apart, in half of the features.
        length = mean_differences(half, half, harmful, topics, measures=("length",))["length"]
        assert list(length) == pytest.approx([2 / np.sqrt(2)] * 3)
        assert mean_differences(half, 3 * half, harmful, topics, measures=MEASURES)["length"].value == pytest.approx(
            3 * length.value
        )


def test_table_compares_every_surface_with_text() -> None:
    rng = np.random.default_rng(0)
    text = states(rng, FIRST, 0.5)
    table = mean_difference_table(activations({"image": text / 4 + 7, "text": text}, HARMFUL, NAMES))
    cells = table.set_index(["surface", "measure"])["value"]
    assert set(cells.index) == {("image", name) for name in MEASURES} | {("text", "length")}
    assert cells["image", "shrinkage"] == pytest.approx(1 / 4, rel=1e-4)
    assert cells["image", "length"] == pytest.approx(cells["text", "length"] / 4, rel=1e-4)
    assert cells["image", "cosine"] == pytest.approx(1, abs=1e-4) and (table["n"] == len(NAMES)).all()
    mixed = activations({"text": text, "image": text}, HARMFUL, NAMES)
    mixed.index.loc[len(NAMES), "query_id"] = "another"
    with pytest.raises(InputError, match="surface 'image' has other requests than 'text'"):
        mean_difference_table(mixed)
