"""Every family of models: chat formats, padded batches, caches, states, and CASA on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.defenses import examples
from helpers.families import FAMILIES, TEMPLATES, byte_tokenizer, save_family
from PIL import Image

import casa_mech
import probes
from casa_mech.casa import Casa, CasaConfig, TrainSettings
from casa_mech.defenses import train_defense
from casa_mech.errors import InputError, ModelError
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.omni.chat import MediaRuns, chat_format, chat_pieces
from casa_mech.queries import AudioPart, Example, ImagePart, Query, TextPart, Turn
from casa_mech.trace import capture
from casa_mech.trace.fork import read_prompts, resumed
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.sweep import read_positions
from probes.gate import attribute_token_difference

SHORT, LONG = "tea ?", "how do i make a very good cake for five people , please ?"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint of each family."""
    return save_family(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def omni(family: Path) -> Omni:
    """The model of each family."""
    return load_omni(family, device="cpu")


def queries_for(omni: Omni) -> list[Query]:
    """Two texts of different lengths, and what else the model reads."""
    rng = np.random.default_rng(0)
    queries = [
        Query.from_text(SHORT, id="short", label="benign"),
        Query.from_text(LONG, id="long", label="harmful", system="be brief"),
    ]
    if "image" in omni.modalities:
        picture = Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8))
        queries.append(Query(id="image", parts=(ImagePart(image=picture), TextPart(text=SHORT)), label="harmful"))
    if "audio" in omni.modalities:
        clip = (0.1 * rng.standard_normal(8_000)).astype(np.float32)
        queries.append(Query(id="audio", parts=(AudioPart(audio=clip, rate=16_000), TextPart(text=SHORT))))
    return queries


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_are_what_the_template_renders(name: str) -> None:
    tokenizer = byte_tokenizer(name)
    history = (
        Turn(role="user", parts=(TextPart(text="hello"),)),
        Turn(role="assistant", parts=(TextPart(text="yes ?"),)),
    )
    said = [("user", "hello"), ("assistant", "yes ?"), ("user", "tea ?")]
    conversations = {None: [("user", "tea ?")], "history": said}
    chat = chat_format(tokenizer, None)
    for kind, turns in conversations.items():
        query = Query.from_text("tea ?", history=history if kind else ())
        messages = [{"role": role, "content": text} for role, text in turns]
        options = {"enable_thinking": False, "date_string": "26 Jul 2024"}
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        pieces = chat_pieces(query, MediaRuns([], []), [], chat)
        assert "".join(piece.text for piece in pieces) == rendered
        assert [piece.text for piece in pieces if piece.role == "text"][-1] == "tea ?"
    if name == "mistral":
        return
    ordered = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "tea ?"}]
    rendered = tokenizer.apply_chat_template(ordered, tokenize=False, add_generation_prompt=True, **options)
    pieces = chat_pieces(Query.from_text("tea ?", system="be brief"), MediaRuns([], []), [], chat)
    assert "".join(piece.text for piece in pieces) == rendered


def test_a_first_token_that_begins_every_turn_is_written_once() -> None:
    tokenizer = byte_tokenizer("chatml with a system prompt")
    tokenizer.bos_token = "<|im_start|>"
    pieces = chat_pieces(Query.from_text("tea ?", system=""), MediaRuns([], []), [], chat_format(tokenizer, None))
    assert "".join(piece.text for piece in pieces) == "<|im_start|>user\ntea ?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_cannot_be_used_is_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ModelError, match="no such thing"):
        chat_format(tokenizer, "{{ raise_exception('no such thing') }}", "m")
    with pytest.raises(ModelError, match="an earlier turn otherwise than the last"):
        chat_format(tokenizer, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot: ", "m")
    open_ended = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
    with pytest.raises(ModelError, match="ends a reply with no special token"):
        chat_format(tokenizer, open_ended, "m")
    tokenizer.chat_template = None
    assert chat_format(tokenizer, None).end_of_turn == "<|im_end|>"


def test_a_padded_row_is_read_as_it_is_alone(omni: Omni) -> None:
    queries = queries_for(omni)
    with torch.no_grad():
        together = omni.model(**omni.encode(queries).inputs).logits[:, -1]
        for row, query in enumerate(queries):
            alone = omni.model(**omni.encode([query]).inputs).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=2e-4, rtol=1e-4)


def test_a_batch_is_continued_as_each_row_alone(omni: Omni) -> None:
    queries = queries_for(omni)
    settings = GenerationSettings(max_new_tokens=6, batch_size=8)
    together = omni.generate(queries, settings)
    assert [reply.text for reply in together] == [omni.generate([query], settings)[0].text for query in queries]


def test_prompts_that_were_read_go_on_from_the_cache(omni: Omni) -> None:
    queries = queries_for(omni)
    batch = omni.encode(queries)
    options = {"max_new_tokens": 5, "do_sample": False}
    width = batch.inputs["input_ids"].shape[1]
    plain = omni.model.generate(**batch.inputs, **options)[:, width:]
    with torch.no_grad():
        start = resumed(omni, read_prompts(omni, batch))
    assert torch.equal(omni.model.generate(**start, **options)[:, width:], plain)


def test_states_are_the_models_own(omni: Omni) -> None:
    batch = omni.encode(queries_for(omni))
    with torch.no_grad():
        hidden = omni.model(**batch.inputs, output_hidden_states=True).hidden_states
    states = capture(omni, batch, ["embeddings", 0, "z.1", "attention.1", "mlp.1", "norm"])
    torch.testing.assert_close(states["embeddings"], hidden[0][:, -1])
    torch.testing.assert_close(states[0], hidden[1][:, -1])
    torch.testing.assert_close(states["norm"], hidden[2][:, -1])
    assert states["z.1"].shape == (batch.size, omni.n_heads, omni.d_head)


def test_a_block_adds_what_attention_and_mlp_give(omni: Omni) -> None:
    states = capture(omni, omni.encode(queries_for(omni)), ["pre.1", "attention.1", "mlp.1", 1])
    torch.testing.assert_close(states["pre.1"] + states["attention.1"] + states["mlp.1"], states[1])


def test_encoders_are_read_at_the_positions_they_fill(omni: Omni) -> None:
    batch = omni.encode(queries_for(omni))
    for site, medium in (("vision", "image"), ("audio", "audio")):
        if medium not in omni.modalities:
            continue
        states = capture(omni, batch, [site, "embeddings"], "all")
        filled = batch.modality[medium]
        torch.testing.assert_close(states[site][filled], states["embeddings"][filled])
        assert filled.any() and not states[site][~filled].any()


def test_casa_is_attached_trained_saved_and_loaded(omni: Omni, family: Path, tmp_path: Path) -> None:
    queries = queries_for(omni)
    examples = [Example(query=queries[0], reply="sure ."), Example(query=queries[1], reply="no .")]
    casa = Casa.attach(omni, CasaConfig(lora_r=2))
    rows = casa.train(examples, TrainSettings(max_steps=2, batch_size=2, micro_batch_size=2), progress=False)
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    settings = GenerationSettings(max_new_tokens=4, batch_size=8)
    replies = casa.generate(queries, settings)
    alone = [casa.generate([query], settings)[0] for query in queries]
    assert [reply.text for reply in replies] == [reply.text for reply in alone]
    np.testing.assert_allclose([reply.v_s for reply in replies], [reply.v_s for reply in alone], atol=1e-4)
    casa.save_pretrained(tmp_path / "gate")
    again = Casa.from_pretrained(tmp_path / "gate", load_omni(family, device="cpu"))
    assert [reply.v_s for reply in again.decide(queries)] == [reply.v_s for reply in casa.decide(queries)]


@pytest.mark.parametrize("name", ["ssft", "ssft-token", "refusal-token", "circuit-breaker"])
def test_trained_defences_learn_on_every_family(omni: Omni, name: str, tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "checkpoint_every": 1}
    defense = train_defense(name, omni, examples(8), tmp_path / name, progress=False, **few)
    query = queries_for(omni)[0]
    assert defense.generate([query], GenerationSettings(max_new_tokens=3))[0].query_id == query.id


def test_hidden_positions_are_not_seen_and_others_keep_their_place(omni: Omni) -> None:
    batches = [omni.encode([Query.from_text(f"bake a c{letter}ke", id="q")]) for letter in "ae"]
    place = int((batches[0].inputs["input_ids"] != batches[1].inputs["input_ids"]).nonzero()[0, 1])
    hidden = torch.zeros_like(batches[0].prompt_mask)
    hidden[0, place] = True
    logits = [edited_prompt(omni, batch, batch.gate_position, {}, None, hidden).logits for batch in batches]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    open_eyed = [edited_prompt(omni, batch, batch.gate_position, {}).logits for batch in batches]
    assert not torch.allclose(open_eyed[0], open_eyed[1], atol=1e-4)
    # The columns behind the hidden one keep their positions: hiding is no deletion.
    shorter = omni.encode([Query.from_text("bake a cke", id="q")])
    assert not torch.allclose(logits[0], edited_prompt(omni, shorter, shorter.gate_position, {}).logits, atol=1e-4)


def test_states_exchanged_whole_make_the_other_run(omni: Omni) -> None:
    one, other = (omni.encode([Query.from_text(f"bake a {word}", id=word)]) for word in ("cake", "tart"))
    wanted = edited_prompt(omni, other, other.gate_position, {}).logits
    for site in ("embeddings", 0):
        donor = capture(omni, other, [site], "all")[site]
        patched = edited_prompt(omni, one, one.gate_position, {site: lambda states, donor=donor: donor}).logits
        torch.testing.assert_close(patched, wanted)


def test_contributions_sum_to_the_logit_difference(omni: Omni) -> None:
    attribution = attribute_token_difference(Casa.attach(omni), queries_for(omni))
    np.testing.assert_allclose(attribution.contributions.sum(axis=1), attribution.difference, atol=1e-3)


def test_forced_prefixes_are_read_in_one_forward(omni: Omni) -> None:
    query, ids = queries_for(omni)[0], omni.tokenizer("sure , here", add_special_tokens=False)["input_ids"]
    batch = omni.encode([query], [ids], prefill=False)
    steps = batch.gate_position[:, None] + torch.arange(len(ids) + 1)[None]
    logits = read_positions(omni, batch, steps, [1]).logits
    for length in range(0, len(ids) + 1, 3):
        shorter = omni.encode([query], [ids[:length]], prefill=False)
        with torch.no_grad():
            torch.testing.assert_close(
                logits[0, length], omni.model(**shorter.inputs).logits[0, -1], rtol=1e-3, atol=1e-3
            )


def test_a_probe_reads_strings_on_every_family(omni: Omni) -> None:
    words = ("tea", "bread", "soup", "rice", "cake", "jam")
    harmful, benign = [f"burn the {word} !" for word in words], [f"make {word}" for word in words]
    probe = probes.train(omni, harmful, benign, deals=9)
    assert np.isfinite(probe(["burn the pie !", "make pie"])).all()


def test_a_medium_without_an_encoder_is_refused_by_name(omni: Omni) -> None:
    clip = AudioPart(audio=np.ones(8_000, dtype=np.float32), rate=16_000)
    picture = ImagePart(image=Image.new("RGB", (56, 56)))
    for part in (clip, picture):
        if part.kind not in omni.modalities:
            with pytest.raises(InputError, match=rf"query q: this model reads no {part.kind}; give it text"):
                omni.encode([Query(id="q", parts=(part,))])


def test_a_hub_id_is_loaded_under_the_users_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_family("llama", tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, allow_patterns: str(folder))
    model = casa_mech.load("somebody/some-model", device="cpu")
    assert model.source == "somebody/some-model" and model.architecture.model_types == ("llama",)
    assert casa_mech.load is casa_mech.load_omni
