"""Edits put into a gated forward do what plain hooks do, and nothing more."""

from __future__ import annotations

import pytest
import torch

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace import capture, gated_prompt
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.sweep import read_positions

SITES = ["embeddings", 0, "z.0", "attention.0", "mlp.0", "pre.1", "z.1", "mlp.1", 1, "norm"]


@pytest.fixture
def casa(tiny_omni: Omni) -> Casa:
    """A gate whose LoRA and safety attention do something."""
    torch.manual_seed(0)
    found = Casa.attach(tiny_omni)
    with torch.no_grad():
        for value in found.parts.adapter.parameters().values():
            value.add_(0.1 * torch.randn_like(value))
        for value in found.attention.parameters():
            value.add_(0.5 * torch.randn_like(value))
    return found


def test_edits_that_change_nothing_change_nothing(casa: Casa, mixed_queries: list[Query]) -> None:
    omni, gate = casa.omni, casa.safety_gate
    batch = omni.encode(mixed_queries)
    expected = gated_prompt(omni, batch, gate, batch.gate_position, use_cache=False)
    found = edited_prompt(omni, batch, batch.gate_position, dict.fromkeys(SITES, torch.clone), gate)
    assert found.reading is not None
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.reading.v_s, expected.reading.v_s)
    embeddings = capture(omni, batch, ["embeddings"], "all")["embeddings"]
    without = edited_prompt(omni, batch, batch.gate_position, {}, gate, embeddings=embeddings)
    torch.testing.assert_close(without.logits, expected.logits)


@pytest.mark.parametrize("site", ["embeddings", "z.1", "attention.0", "mlp.1", 0])
def test_an_edit_is_what_a_plain_hook_does(casa: Casa, mixed_queries: list[Query], site: object) -> None:
    omni = casa.omni
    batch = omni.encode(mixed_queries)
    block = omni.blocks
    module, side = {
        "embeddings": (block[0], "input"),
        "z.1": (omni.writers(1)[0], "input"),
        "attention.0": (omni.writers(0)[0], "output"),
        "mlp.1": (block[1].mlp, "output"),
        0: (block[0], "output"),
    }[site]
    handle = (
        module.register_forward_pre_hook(lambda _, given: (given[0] * 0.5, *given[1:]))
        if side == "input"
        else module.register_forward_hook(lambda _, given, result: result * 0.5)
    )
    with torch.no_grad():
        logits = omni.model(**batch.inputs).logits
    handle.remove()
    found = edited_prompt(omni, batch, batch.gate_position, {site: lambda states: states * 0.5})
    torch.testing.assert_close(found.logits, logits[torch.arange(batch.size), batch.gate_position])
    assert not torch.allclose(found.logits, edited_prompt(omni, batch, batch.gate_position, {}).logits)


def test_what_is_exchanged_whole_makes_the_other_run(casa: Casa) -> None:
    omni, gate = casa.omni, casa.safety_gate
    one, other = (omni.encode([Query.from_text(f"how do i make the {word} ?", id=word)]) for word in ("cake", "bomb"))
    wanted = edited_prompt(omni, other, other.gate_position, {}, gate)
    for site in ("embeddings", 0, 1):
        given = capture(omni, other, [site], "all")[site]
        found = edited_prompt(omni, one, one.gate_position, {site: lambda states, given=given: given}, gate)
        torch.testing.assert_close(found.logits, wanted.logits)


def test_hidden_positions_are_not_seen_and_others_keep_their_place(casa: Casa) -> None:
    omni, gate = casa.omni, casa.safety_gate
    # The model attends to the words by their positions: with a word hidden, its token must make no difference, and
    # the result must not be that of a prompt that never had a word there.
    batches = [omni.encode([Query.from_text(f"how do i make {word} ?", id="q")]) for word in ("cake", "bomb", "")]
    place = int((batches[0].inputs["input_ids"] != batches[1].inputs["input_ids"]).nonzero()[0, 1])
    readings = []
    for batch in batches[:2]:
        hidden = torch.zeros_like(batch.prompt_mask)
        hidden[0, place] = True
        readings.append(edited_prompt(omni, batch, batch.gate_position, {}, gate, hidden))
    torch.testing.assert_close(readings[0].logits, readings[1].logits)
    assert torch.equal(readings[0].reading.attention[0, place], torch.tensor(0.0))
    shorter = edited_prompt(omni, batches[2], batches[2].gate_position, {}, gate)
    assert not torch.allclose(readings[0].logits, shorter.logits)


def test_positions_of_one_forward_are_the_ends_of_shorter_ones(tiny_omni: Omni) -> None:
    query = Query.from_text("how do i make a cake ?", id="q")
    ids = tiny_omni.tokenizer("sure , here is how", add_special_tokens=False)["input_ids"]
    batch: OmniBatch = tiny_omni.encode([query], [ids], prefill=False)
    steps = batch.gate_position[:, None] + torch.arange(len(ids) + 1)[None]
    sweep = read_positions(tiny_omni, batch, steps, ["embeddings", 1], whole=0)
    for length in range(len(ids) + 1):
        shorter = tiny_omni.encode([query], [ids[:length]], prefill=False)
        with torch.no_grad():
            result = tiny_omni.model(**shorter.inputs, output_hidden_states=True)
        torch.testing.assert_close(sweep.logits[0, length], result.logits[0, -1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sweep.states["embeddings"][0, length], result.hidden_states[0][0, -1])
    assert sweep.whole is not None and sweep.whole.shape == (1, *batch.inputs["input_ids"].shape[1:], 64)


def test_sites_that_cannot_be_edited_are_refused(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    batch = tiny_omni.encode(mixed_queries[:1])
    with pytest.raises(InputError, match="no site 7"):
        edited_prompt(tiny_omni, batch, batch.gate_position, {7: torch.clone})
    with pytest.raises(InputError, match="edit 'embeddings'"):
        edited_prompt(tiny_omni, batch, batch.gate_position, {"audio": torch.clone})


def test_edges_that_are_cut_are_those_of_attention(casa: Casa, mixed_queries: list[Query]) -> None:
    omni = casa.omni
    batch = omni.encode(mixed_queries, [omni.reply_ids("sure , here")[:-1]] * 4, prefill=False)
    end = batch.inputs["input_ids"].shape[1]
    last = torch.full((4,), end - 1)
    plain = edited_prompt(omni, batch, last, {}).logits
    none = torch.zeros(4, end, end, dtype=torch.bool)
    torch.testing.assert_close(edited_prompt(omni, batch, last, {}, cut=none).logits, plain, atol=1e-5, rtol=1e-4)
    # Cut from all that it could read of position -2, it is hidden from everyone: the same as `hidden`.
    column = none.clone()
    column[:, :, end - 2] = True
    hidden = torch.zeros(4, end, dtype=torch.bool)
    hidden[:, end - 2] = True
    expected = edited_prompt(omni, batch, last, {}, hidden=hidden).logits
    found = edited_prompt(omni, batch, last, {}, cut=column).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)
    # An edge into a position that nobody reads on the way to the last one changes nothing there.
    later = none.clone()
    later[:, end - 2, end - 3] = True
    both = column | later
    torch.testing.assert_close(edited_prompt(omni, batch, last, {}, cut=both).logits, found, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(edited_prompt(omni, batch, last, {}, cut=later).logits, plain, atol=1e-4)
