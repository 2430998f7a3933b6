"""What is read and written through nnsight is what Hugging Face and plain hooks see."""

from __future__ import annotations

import pytest
import torch

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace import capture
from casa_mech.trace.capture import make_cut
from casa_mech.trace.patch import edited_prompt


def hidden_states(omni: Omni, batch: object) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return omni.model(**batch.inputs, output_hidden_states=True).hidden_states


def test_capture_equals_output_hidden_states(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    batch = tiny_omni.encode(mixed_queries)
    expected = hidden_states(tiny_omni, batch)
    found = capture(tiny_omni, batch, ["norm", 0, "embeddings"], "all")
    assert torch.equal(found["embeddings"], expected[0])
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found["norm"], expected[-1])


def test_positions_are_cut_as_named(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    batch = tiny_omni.encode(mixed_queries)
    full = capture(tiny_omni, batch, [1, "norm"], "all")
    last = capture(tiny_omni, batch, [1, "norm"], "last")
    mean = capture(tiny_omni, batch, [1], "mean")[1]
    image = capture(tiny_omni, batch, [1], "mean:image")[1]
    for row in range(batch.size):
        for site in (1, "norm"):
            assert torch.equal(last[site][row], full[site][row, batch.gate_position[row]])
        torch.testing.assert_close(mean[row], full[1][row, batch.prompt_mask[row]].mean(dim=0))
    torch.testing.assert_close(image[1], full[1][1, batch.modality["image"][1]].mean(dim=0))
    assert not image[0].any()


def test_the_user_s_last_token_comes_before_the_template(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    batch = tiny_omni.encode(mixed_queries)
    full, user = (capture(tiny_omni, batch, [1], positions)[1] for positions in ("all", "last:user"))
    header = len(tiny_omni.tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
    for row in range(batch.size):
        place = batch.gate_position[row] - header
        assert torch.equal(user[row], full[row, place]) and batch.modality["text"][row, place]
        assert tiny_omni.tokenizer.decode(batch.inputs["input_ids"][row, place]) == "?"
    # A request that ends in its picture has the picture's last token.
    first = mixed_queries[1].model_copy(update={"parts": mixed_queries[1].parts[::-1]})
    alone = tiny_omni.encode([first])
    cut = make_cut(alone, "last:user")
    assert cut.column.tolist() == [int(alone.modality["image"][0].nonzero().max())]


def test_unknown_places_are_named(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    batch = tiny_omni.encode(mixed_queries[:1])
    with pytest.raises(InputError, match="no site 9"):
        capture(tiny_omni, batch, [9])
    with pytest.raises(InputError, match="mean:video"):
        capture(tiny_omni, batch, [0], "mean:video")
    assert capture(tiny_omni, batch, []) == {}


@pytest.mark.parametrize("site", ["embeddings", 0, "norm"])
def test_identity_edits_change_nothing_and_others_do(tiny_omni: Omni, mixed_queries: list[Query], site: object) -> None:
    batch = tiny_omni.encode(mixed_queries)
    with torch.no_grad():
        expected = tiny_omni.model(**batch.inputs).logits[torch.arange(batch.size), batch.gate_position]
    for edit in (lambda states: states, torch.clone):
        torch.testing.assert_close(edited_prompt(tiny_omni, batch, batch.gate_position, {site: edit}).logits, expected)
    changed = edited_prompt(tiny_omni, batch, batch.gate_position, {site: lambda states: states * 0.5}).logits
    assert not torch.allclose(changed, expected)


def test_capture_follows_adapters_in_and_out(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    batch = tiny_omni.encode(mixed_queries)
    before = capture(tiny_omni, batch, [0], "all")[0]
    casa = Casa.attach(tiny_omni)
    with torch.no_grad():
        for parameter in casa.parts.adapter.parameters().values():
            parameter.add_(0.1)
    during = capture(tiny_omni, batch, [0], "all")[0]
    assert torch.equal(during, hidden_states(tiny_omni, batch)[1])
    assert not torch.allclose(during, before)
    casa.detach()
    assert torch.equal(capture(tiny_omni, batch, [0], "all")[0], before)
