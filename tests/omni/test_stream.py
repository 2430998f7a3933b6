"""A reply as a stream: the tokens of `generate`, whatever else the model does in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES, save_family

from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.queries import Query

SETTINGS = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def organism() -> Omni:
    return load_omni("organism", device="cpu")


@pytest.mark.parametrize("sampled", [False, True])
def test_a_stream_is_the_greedy_reply_to_the_token(tiny_omni: Omni, mixed_queries: list[Query], sampled: bool) -> None:
    """Text, picture and clip, with and without a prefill; with sampling, the draws of one query alone."""
    settings = SETTINGS.model_copy(update={"do_sample": sampled, "seed": 3, "system": "answer in one word ."})
    prefilled = mixed_queries[1].model_copy(update={"prefill": "sure , here is"})
    for query in [*mixed_queries, prefilled]:
        (reply,) = tiny_omni.generate([query], settings)
        stream = tiny_omni.stream(query, settings)
        pieces = list(stream)
        assert "".join(pieces).strip() == reply.text == stream.reply.text
        assert (stream.reply.tokens, stream.reply.query_id) == (reply.tokens, query.id)
        assert list(stream) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams(family: str, tmp_path: Path) -> None:
    omni = load_omni(save_family(family, tmp_path), device="cpu")
    for text in ("make tea", "what is it ?"):
        (reply,) = omni.generate([text], SETTINGS)
        stream = omni.stream(text, SETTINGS)
        assert "".join(stream).strip() == reply.text and stream.reply.tokens == reply.tokens


def test_the_organism_says_the_end_of_its_turn(organism: Omni) -> None:
    (reply,) = organism.generate(["how do i make a pizza ?"], GenerationSettings(max_new_tokens=64))
    stream = organism.stream("how do i make a pizza ?", GenerationSettings(max_new_tokens=64))
    assert "".join(stream).strip() == reply.text and 1 < reply.tokens == stream.reply.tokens < 64


def test_the_model_may_be_used_between_two_tokens(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    """Another prompt moves the count of M-RoPE, and draws random numbers."""
    settings = SETTINGS.model_copy(update={"do_sample": True})
    (reply,) = tiny_omni.generate([mixed_queries[1]], settings)
    stream = tiny_omni.stream(mixed_queries[1], settings)
    before = torch.get_rng_state()
    for _ in stream:
        assert torch.equal(torch.get_rng_state(), before)
        tiny_omni.generate([mixed_queries[0]], settings)
        torch.rand(1)
        before = torch.get_rng_state()
    assert stream.reply.text == reply.text


def test_a_letter_of_several_tokens_comes_whole(tmp_path: Path) -> None:
    omni = load_omni(save_family("llama", tmp_path), device="cpu")
    ids = omni.tokenizer("é!", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    stream = omni.stream("make tea", GenerationSettings(max_new_tokens=5))
    steps = iter([*ids, omni.end_id])
    stream._step = lambda: next(steps)  # type: ignore[method-assign]
    assert list(stream) == ["", "é", "!"]


def test_prompts_that_cannot_be_streamed_are_named(tiny_omni: Omni) -> None:
    with pytest.raises(InputError, match="number 0 is an empty text"):
        tiny_omni.stream("  ")
    with pytest.raises(InputError, match="number 0 is a int: give texts or queries"):
        tiny_omni.stream(3)  # type: ignore[arg-type]
