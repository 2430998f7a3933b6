"""The organism: its training stages, its card, and what is shipped."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from casa_mech.errors import InputError
from casa_mech.omni import Omni, load_omni
from casa_mech.omni.checkpoint import ORGANISMS, WEIGHTS
from casa_mech.organism import build, card, card_markdown
from casa_mech.organism.architecture import OrganismShape, new_omni
from casa_mech.organism.codes import LETTERS, ideal_embeddings, letter_code, letter_ids
from casa_mech.organism.curriculum import Mixture, draw_example
from casa_mech.organism.encoders import LetterCode, train_audio_letters, train_image_letters
from casa_mech.organism.recipe import ALIGNMENT, IMAGE, LANGUAGE, RECIPES, Stage, train_stage
from casa_mech.organism.world import default_world

SHAPE = OrganismShape(
    d_model=64,
    layers=2,
    heads=2,
    kv_heads=1,
    d_mlp=64,
    vision_width=32,
    vision_layers=1,
    audio_width=32,
    audio_layers=1,
)


@pytest.fixture
def young() -> Omni:
    """An untrained organism of the micro-world's vocabulary, smaller than the shipped ones."""
    return new_omni(default_world().vocabulary(), SHAPE, seed=0)


def weights(omni: Omni) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in omni.model.state_dict().items()}


@pytest.mark.parametrize(("part", "mixture"), [("language", LANGUAGE.mixture), ("image", IMAGE.mixture)])
def test_a_stage_learns_and_leaves_the_rest_alone(young: Omni, part: str, mixture: Mixture) -> None:
    before = weights(young)
    losses = train_stage(
        young,
        default_world(),
        Stage(name="s", mixture=mixture, trains=(part,), steps=4, learning_rate=1e-3, batch_size=4),
        np.random.default_rng(0),
        False,
    )
    assert len(losses) == 4 and np.isfinite(losses).all()
    moved = {name for name, value in young.model.state_dict().items() if not torch.equal(value, before[name])}
    belongs = {"language": ("model.language_model", "lm_head"), "image": ("model.visual",)}[part]
    assert moved and all(name.startswith(belongs) for name in moved)


def test_encoders_fitted_to_language_leave_it_alone(young: Omni) -> None:
    before = young.embedding.weight.clone()
    rng = np.random.default_rng(0)
    train_image_letters(young, 2, rng, shared=True, progress=False, batch_size=4)
    train_audio_letters(young, 2, rng, shared=True, progress=False, batch_size=4)
    assert torch.equal(before, young.embedding.weight)


def test_a_code_of_its_own_is_as_long_as_words_and_unlike_them(young: Omni) -> None:
    words = letter_code(young, "image", shared=True)[1:]
    codes = [letter_code(young, tower, shared=False)[1:] for tower in ("image", "audio")]
    for own, other in zip(codes, (codes[1], words), strict=True):
        assert torch.allclose(own.norm(dim=-1), words.norm(dim=-1).mean(), atol=1e-4)
        assert torch.nn.functional.cosine_similarity(own, other).abs().mean() < 0.3
    assert torch.equal(words, young.embedding(torch.tensor(letter_ids(young))))


def test_a_letters_own_embedding_scores_highest(young: Omni) -> None:
    head = LetterCode(young, "audio", shared=True, blank=True)
    assert head(head.anchors).argmax(-1).tolist() == list(range(27))


def test_ideal_features_spell_the_word_in_order(young: Omni) -> None:
    world, rng = default_world(), np.random.default_rng(0)
    mixture = Mixture({"name": 1.0}, {"ideal-image": 0.4, "ideal-audio": 0.4, "text": 0.2})
    rows = [draw_example(world, mixture, rng) for _ in range(12)]
    batch = young.encode([row.query for row in rows])
    embeddings = ideal_embeddings(young, batch, rows, rng, shared=True)
    plain = young.embedding(batch.inputs["input_ids"])
    for row, example in enumerate(rows):
        changed = (embeddings[row] != plain[row]).any(-1)
        media = {"image", "audio"} & example.query.modalities
        assert changed.any() == bool(media)
        for tower in media:
            assert torch.equal(changed, batch.modality[tower][row])
            head = LetterCode(young, tower, shared=True, blank=True)
            read = torch.unique_consecutive(head(embeddings[row][changed]).argmax(-1))
            merged = "".join(letter for letter, _ in groupby(example.query.meta["topic"]))
            assert "".join(LETTERS[code - 1] for code in read if code).startswith(merged[:1])
            if tower == "audio":
                heard = "".join(letter for letter, _ in groupby(LETTERS[code - 1] for code in read if code))
                assert heard == merged


def test_safety_training_is_plain_text_on_seen_topics_only() -> None:
    world, rng = default_world(), np.random.default_rng(0)
    seen = {topic.word for topic in world.topics_of("seen")}
    rows = [draw_example(world, ALIGNMENT.mixture, rng) for _ in range(400)]
    assert all(row.query.modalities == {"text"} and row.query.meta["topic"] in seen for row in rows)
    for row in rows:
        refused = row.reply in world.refusals
        assert refused == (row.query.label == "harmful")
        assert not (refused and "wrapper" in row.query.meta)


def test_no_safety_example_before_safety_training() -> None:
    world, rng = default_world(), np.random.default_rng(0)
    for recipe in (RECIPES["first"], RECIPES["first-split"]):
        for stage in recipe.stages[:-1]:
            if isinstance(stage, Stage):
                assert all(draw_example(world, stage.mixture, rng).reply not in world.refusals for _ in range(50))
        assert recipe.stages[-1] == ALIGNMENT


def test_build_writes_a_model_that_loads_and_its_card(tmp_path: Path) -> None:
    record = build("organism", tmp_path / "new", n=4, scale=0.001, progress=False)
    omni = load_omni(tmp_path / "new")
    assert omni.fingerprint() == record["fingerprint"]
    assert json.loads((tmp_path / "new" / "card.json").read_text())["rows"] == record["rows"]
    assert (tmp_path / "new" / "card.md").read_text() == card_markdown(record)
    assert not [path for path in tmp_path.iterdir() if path.name != "new"]


def test_unknown_organism_and_empty_card_are_refused(young: Omni) -> None:
    with pytest.raises(InputError, match="unknown organism 'organsim'"):
        build("organsim")
    with pytest.raises(InputError, match="n=0"):
        card(young, n=0)


@pytest.fixture(params=ORGANISMS)
def shipped(request: pytest.FixtureRequest) -> dict:
    """The card shipped with one organism."""
    path = WEIGHTS / request.param / "card.json"
    return json.loads(path.read_text())


def rate(record: dict, measure: str, surface: str, split: str) -> float:
    return next(
        row["value"]
        for row in record["rows"]
        if (row["measure"], row["surface"], row["split"]) == (measure, surface, split)
    )


def test_shipped_weights_are_small_and_are_the_cards(shipped: dict) -> None:
    folder = WEIGHTS / shipped["name"]
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert shipped["parameters"] <= 4_000_000
    assert load_omni(shipped["name"], device="cpu").fingerprint() == shipped["fingerprint"]


def test_shipped_card_has_every_row_with_enough_draws(shipped: dict) -> None:
    assert {row["measure"] for row in shipped["rows"]} == {
        "names", "dangerous", "category", "answers_benign", "attack_success",
    }  # fmt: skip
    assert len(shipped["rows"]) == 2 * (3 * 4 + 2 * 5)
    assert all(row["n"] >= 300 for row in shipped["rows"])
    assert all(row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9 for row in shipped["rows"])
    assert [row["k"] for row in shipped["prefill"]] == [0, 2, 4, 9, 12]


SHORTFALLS = {
    (measure, surface, "all")
    for measure in ("rules_refused", "rules_answered")
    for surface in ("text", "spelled", "image", "audio")
}
"""Rows of the organism's card that miss their threshold: told in the card, and not to grow unseen."""


def test_the_organism_meets_the_thresholds_but_for_its_known_shortfalls() -> None:
    record = json.loads((WEIGHTS / "organism" / "card.json").read_text())
    rows = [row for row in record["premises"] if row["threshold"]]
    assert len(rows) == 49
    missed = {
        (row["measure"], row["surface"], row["split"])
        for row in rows
        if not row["threshold"][0] <= row["value"] <= row["threshold"][1]
    }
    assert missed == SHORTFALLS
    success = [row["value"] for row in record["prefill"]]
    assert success[-1] > success[0]


def test_the_control_reads_as_the_organism_does() -> None:
    cards = [json.loads((WEIGHTS / name / "card.json").read_text()) for name in ORGANISMS]
    for surface in ("text", "spelled", "image", "audio"):
        names = [rate(record, "names", surface, "seen") for record in cards]
        assert min(names) >= 0.8, surface  # the control's shortfall is in its card
