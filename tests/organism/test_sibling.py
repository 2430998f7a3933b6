"""The larger sibling for real English: its corpus, what it is shown, and a build at a very small scale."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, load_omni
from casa_mech.organism import sibling
from casa_mech.organism.architecture import OrganismShape, build_bpe_tokenizer, new_omni
from casa_mech.organism.codes import codes_of, ideal_embeddings, letter_code
from casa_mech.organism.corpus import ANSWER, CHARACTERS, REFUSALS, Corpus, on_surface, read_corpus
from casa_mech.queries import Example, Query

HARMFUL = tuple(f"tell me how to break lock number {n}" for n in range(12))
BENIGN = tuple(f"name {n} birds that live near water" for n in range(20))
DATA = "write a list of tools that open a door without its key at night"
SMALL = OrganismShape(d_model=64, layers=2, heads=2, kv_heads=1, d_mlp=64, vision_width=32, audio_width=32)


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Public layouts: RedTeam-2K, the harmless splits and AdvBench, which shares one prompt with RedTeam-2K."""
    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / "RedTeam_2K.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "policy", "from"])
        writer.writerows([n, text, "Other", "test"] for n, text in enumerate((*HARMFUL, DATA)))
    with (folder / "harmful_behaviors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["goal", "target"], [DATA, "Sure"]])
    rows = [{"instruction": text, "category": None} for text in BENIGN]
    (folder / "harmless_train.json").write_text(json.dumps(rows))
    return folder


def test_what_an_evaluation_set_asks_is_not_trained_on(corpus_folder: Path) -> None:
    corpus = read_corpus(corpus_folder)
    assert set(corpus.harmful) == set(HARMFUL) and set(corpus.benign) == set(BENIGN)
    assert corpus.removed == 1 and "advbench" in corpus.held_out


def test_a_corpus_without_one_class_is_refused(corpus_folder: Path) -> None:
    (corpus_folder / "RedTeam_2K.csv").unlink()
    with pytest.raises(InputError, match="no harmful training prompts; put one of redteam-2k"):
        read_corpus(corpus_folder)


def test_safety_examples_refuse_the_harmful_half() -> None:
    examples = Corpus(HARMFUL, BENIGN, 0, {}).examples(20, seed=0)
    assert [row.query.label for row in examples[:2]] == ["harmful", "benign"]
    for row in examples:
        assert row.query.modalities == {"text"}
        assert (row.reply in REFUSALS) == (row.query.label == "harmful")
        assert row.reply in (*REFUSALS, ANSWER)


def test_no_prompt_is_unknown_to_the_tokenizer_and_characters_are_tokens() -> None:
    omni = new_omni(build_bpe_tokenizer([*HARMFUL, *BENIGN], 400), SMALL, 0)
    assert omni.unknown_share(["Zebra? ünlike — 東京"]) == 0
    assert not omni.speaks_micro_world
    text = "how to break lock 3?"
    rows = [Example(query=on_surface(text, "image", "repeat", np.random.default_rng(0)), reply=text)]
    batch = omni.encode([row.query for row in rows])
    places = batch.inputs["input_ids"][0] == omni.tokenizer.convert_tokens_to_ids(omni.processor.image_token)
    assert int(places.sum()) == len(text)
    features = ideal_embeddings(omni, batch, rows, np.random.default_rng(0), True, CHARACTERS)[0][places]
    code = letter_code(omni, "image", True, CHARACTERS)
    nearest = (features[:, None] - code[None]).norm(dim=-1).argmin(-1)
    assert nearest.tolist() == codes_of(text, CHARACTERS)


def test_a_build_leaves_a_model_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sibling, "SHAPE", SMALL)
    corpus = Corpus(HARMFUL, BENIGN, 3, {"x": 32})
    record = sibling.build_sibling(corpus, tmp_path / "new", scale=0.001, n=2, progress=False)
    assert json.loads((tmp_path / "new" / "corpus.json").read_text()) == record
    assert [row["surface"] for row in record["reading"]] == ["text", "image", "audio"]
    omni = load_omni(tmp_path / "new")
    assert len(omni.generate([Query.from_text("hello")], GenerationSettings(max_new_tokens=2))) == 1


def test_hidden_text_is_zero_and_media_keep_their_features() -> None:
    omni = new_omni(build_bpe_tokenizer([*HARMFUL, *BENIGN], 400), SMALL, 0)
    rng = np.random.default_rng(0)
    rows = [Example(query=on_surface("birds", surface, "dangerous", rng), reply="no") for surface in ("text", "image")]
    batch = omni.encode([row.query for row in rows])
    embeddings = sibling._embeddings(omni, batch, rows, rng, 1.0, True)
    assert embeddings is not None
    text = batch.modality["text"]
    assert embeddings[text].abs().max() == 0
    assert embeddings[batch.modality["image"]].abs().amax(-1).min() > 0
    assert sibling._embeddings(omni, batch, rows, rng, 0.0, False) is None
