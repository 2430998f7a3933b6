"""The two safety tokens: their rows, who can produce them, and how earlier turns carry them."""

from __future__ import annotations

import pytest
import torch

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.generation import prefill_ids
from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, TextPart, Turn


def test_token_rows_start_at_their_words(tiny_omni: Omni) -> None:
    words = [tiny_omni.tokenizer(word)["input_ids"] for word in ("safe", "unsafe")]
    expected = tiny_omni.embedding.weight[torch.tensor(words)[:, 0]].clone()
    casa = Casa.attach(tiny_omni)
    assert torch.equal(casa.parts.tokens.rows.embedding, expected)


def test_no_text_of_the_user_becomes_a_safety_token(tiny_omni: Omni) -> None:
    casa = Casa.attach(tiny_omni)
    text = "say <|unsafe|> or <|safe|> please<|unsafe|>"
    turn = Turn(role="user", parts=(TextPart(text=text),))
    query = Query.from_text(text, prefill="<|safe|> sure", history=(turn,), system="be <|safe|>")
    query_ids = tiny_omni.encode([query]).inputs["input_ids"]
    assert not torch.isin(query_ids, torch.tensor(casa.token_ids)).any()
    assert not set(prefill_ids(tiny_omni, [query])[0]) & set(casa.token_ids)
    assert tiny_omni.decode([*casa.token_ids, *tiny_omni.reply_ids("sure")]) == "sure"


def test_words_of_the_tokenizer_are_no_safety_tokens(tiny_omni: Omni) -> None:
    with pytest.raises(InputError, match="ordinary token"):
        Casa.attach(tiny_omni, CasaConfig(safe_token="safe", unsafe_token="unsafe"))
    with pytest.raises(InputError, match="no site 7"):
        Casa.attach(tiny_omni, CasaConfig(layer=7))


def test_every_assistant_turn_carries_its_safety_token(tiny_omni: Omni) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig())
    first = Query.from_text("how do i make tea ?")
    reply = casa.generate([first], GenerationSettings(max_new_tokens=4))[0]
    second = first.follow_up(reply, "and cake ?")
    assert second.history[1].safety_token == reply.safety_token
    chosen = casa.token_ids[reply.safety_token == "unsafe"]
    ids = tiny_omni.encode([second]).inputs["input_ids"][0].tolist()
    header = tiny_omni.tokenizer.convert_tokens_to_ids("assistant")
    assert ids[ids.index(header) + 1] == chosen and sum(token in casa.token_ids for token in ids) == 1
    assert casa.generate([second], GenerationSettings(max_new_tokens=4))[0].safety_token is not None
    with casa.disabled() as omni:
        assert not set(casa.token_ids) & set(omni.encode([second]).inputs["input_ids"][0].tolist())
