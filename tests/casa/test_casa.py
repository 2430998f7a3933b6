"""CASA on the tiny random model: attaching, the traced gate against plain hooks, gated generation, taking off."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.casa import SHORT, stir
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa import generation as generation_module
from casa_mech.casa.generation import choose_token, prefill_ids
from casa_mech.casa.objective import class_weights, objective, sequence_losses
from casa_mech.errors import InputError, ModelError
from casa_mech.omni import GenerationSettings, Omni, OmniBatch
from casa_mech.queries import Query, TextPart, Turn
from casa_mech.trace.gate import GatedTargets, GateReading, gated_prompt, gated_targets


def states_of(omni: Omni) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in omni.model.state_dict().items()}


def teacher_forced(casa: Casa) -> tuple[OmniBatch, Tensor]:
    safe, unsafe = casa.token_ids
    queries = [
        Query.from_text("how do i make a cake ?"),
        Query.from_text("please explain how to make the bomb to me ."),
    ]
    replies = ["sure , here is a cake", "sorry , can not help ."]
    targets = [[token, *casa.omni.reply_ids(text)] for token, text in zip((safe, unsafe), replies, strict=True)]
    return casa.omni.encode(queries, targets, prefill=False), torch.tensor([False, True])


# Attaching and taking off


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 5])
def test_detach_gives_the_base_back(tiny_omni: Omni, mixed_queries: list[Query], tied: bool, spare: int) -> None:
    embedding, head = tiny_omni.embedding, tiny_omni.head
    if tied:
        head.weight = embedding.weight
    for weight in {id(embedding.weight): embedding.weight, id(head.weight): head.weight}.values():
        weight.data = torch.cat([weight.data, torch.randn(spare, weight.shape[1])])
    before, size = states_of(tiny_omni), tiny_omni.vocab_size
    replies = [reply.text for reply in tiny_omni.generate(mixed_queries, SHORT)]
    casa = stir(Casa.attach(tiny_omni))
    assert tiny_omni.vocab_size == (size if spare else size + 2)
    assert tiny_omni.model.config.text_config.vocab_size == tiny_omni.vocab_size
    assert (casa.parts.tokens.rows.head is None) == tied
    assert torch.equal(embedding.weight[list(casa.token_ids)], casa.parts.tokens.rows.embedding)
    casa.generate(mixed_queries, SHORT)
    with casa.disabled() as omni:
        assert [reply.text for reply in omni.generate(mixed_queries, SHORT)] == replies
        with pytest.raises(InputError, match="disabled"):
            casa.generate(mixed_queries)
    casa.detach()
    after = tiny_omni.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in tiny_omni.text_model.parameters())
    stir(Casa.attach(tiny_omni)).detach()


def test_only_the_language_model_is_adapted_and_only_casa_is_trained(tiny_omni: Omni) -> None:
    casa = Casa.attach(tiny_omni)
    trainable = {name for name, value in tiny_omni.model.named_parameters() if value.requires_grad}
    assert trainable and all(name.startswith("model.language_model.layers.") and "lora" in name for name in trainable)
    assert len(trainable) == 2 * 7 * tiny_omni.n_layers
    with pytest.raises(ModelError, match="adapter in it already"):
        Casa.attach(tiny_omni)
    casa.detach()


@pytest.mark.parametrize("source", ["pooled_text_hidden", "input_embedding_rows", "lm_head_rows", "learned_free"])
@pytest.mark.parametrize("layer", ["norm", 0])
def test_query_sources_and_layers(tiny_omni: Omni, mixed_queries: list[Query], source: str, layer: object) -> None:
    casa = Casa.attach(tiny_omni, CasaConfig(query_source=source, layer=layer, form="compete"))
    first, second = casa.attention.class_embeddings
    assert not torch.allclose(first, second)
    assert all(0 < reply.v_s < 1 for reply in casa.decide(mixed_queries) if reply.v_s is not None)


# The traced gate against plain hooks


def hooked_reading(casa: Casa, batch: OmniBatch) -> GateReading:
    """The gate without nnsight: a forward hook on the norm, then the equations."""
    omni, seen = casa.omni, {}
    handle = omni.norm.register_forward_hook(lambda module, args, output: seen.update(states=output))
    try:
        with torch.no_grad():
            logits = omni.model(**batch.inputs).logits
    finally:
        handle.remove()
    v_s, attention = casa.attention(seen["states"], batch.prompt_mask)
    z = logits[torch.arange(batch.size), batch.gate_position][:, list(casa.token_ids)]
    pair = torch.stack([z[:, 0] + torch.log(1 - v_s), z[:, 1] + torch.log(v_s)], dim=1)
    return GateReading(v_s, pair, z, attention)


def test_traced_gate_equals_plain_hooks(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = stir(Casa.attach(tiny_omni))
    batch = tiny_omni.encode(mixed_queries, prefill=False)
    expected = hooked_reading(casa, batch)
    prompt = gated_prompt(tiny_omni, batch, casa.safety_gate, batch.gate_position)
    for name in ("v_s", "pair", "raw_pair", "attention"):
        torch.testing.assert_close(getattr(prompt.reading, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prompt.logits[:, list(casa.token_ids)], expected.pair, atol=1e-5, rtol=1e-5)
    for query, v_s in zip(mixed_queries, expected.v_s.tolist(), strict=True):
        assert casa.decide([query])[0].v_s == pytest.approx(v_s, abs=1e-5)


def test_traced_objective_and_gradients_equal_plain_hooks(tiny_omni: Omni) -> None:
    casa = stir(Casa.attach(tiny_omni))
    batch, harmful = teacher_forced(casa)
    weights, rows = class_weights(harmful, 0.3), casa.parts.tokens.rows
    slow, fast = casa.parts.groups()
    parameters = list((slow | fast).values())

    targets = gated_targets(tiny_omni, batch, casa.safety_gate, rows)
    loss = objective(sequence_losses(casa.config, targets, harmful), weights, 2.0)
    traced_gradients = torch.autograd.grad(loss, parameters)

    seen: dict[str, Tensor] = {}

    def embed(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        for token, row in zip(casa.token_ids, rows.embedding, strict=True):
            output = torch.where((args[0] == token).unsqueeze(-1), row, output)
        return output

    handles = [
        tiny_omni.embedding.register_forward_hook(embed),
        tiny_omni.norm.register_forward_hook(lambda module, args, output: seen.update(h=output)),
    ]
    logits = tiny_omni.model(**batch.inputs).logits.clone()
    for handle in handles:
        handle.remove()
    assert rows.head is not None and batch.labels is not None
    logits[..., list(casa.token_ids)] = seen["h"] @ rows.head.T
    v_s, _ = casa.attention(seen["h"], batch.prompt_mask)
    expected_loss = torch.zeros(())
    for row, position in enumerate(batch.gate_position.tolist()):
        safe, unsafe = casa.token_ids
        logits[row, position, safe] += torch.log(1 - v_s[row])
        logits[row, position, unsafe] += torch.log(v_s[row])
        losses = nn.functional.cross_entropy(
            logits[row, position:-1], batch.labels[row, position + 1 :], reduction="none"
        )
        expected_loss = expected_loss + weights[row] * (2.0 * losses[0] + losses[1:].mean())
    torch.testing.assert_close(loss, expected_loss)
    expected = torch.autograd.grad(expected_loss, parameters)
    for one, other in zip(traced_gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class Detached:
    """The gate with one of its two paths cut: the logits' (`"logits"`) or v_s's (`"v_s"`)."""

    layer = "norm"

    def __init__(self, casa: Casa, cut: str) -> None:
        self._gate, self._cut = casa.safety_gate, cut

    def mask(self, batch: OmniBatch) -> Tensor:
        return self._gate.mask(batch)

    def __call__(self, states: Tensor, mask: Tensor, logits: Tensor) -> tuple[Tensor, GateReading]:
        if self._cut == "logits":
            return self._gate(states, mask, logits.detach())
        with torch.no_grad():
            v_s, _ = self._gate.attention(states, mask)
        shift = torch.stack([torch.log(1 - v_s), torch.log(v_s)], dim=1)
        new = logits.index_add(1, self._gate.token_ids, shift)
        return new, GateReading(v_s, new[:, self._gate.token_ids], new, mask)


def gradients(casa: Casa, gate: object, loss_of: Callable[[GatedTargets], Tensor]) -> tuple[float, float, float]:
    """Sizes of the gradients on LoRA, on the token rows and on safety attention."""
    batch, _ = teacher_forced(casa)
    slow, fast = casa.parts.groups()
    targets = gated_targets(casa.omni, batch, gate, casa.parts.tokens.rows)
    values = list((slow | fast).values())
    slopes = torch.autograd.grad(loss_of(targets), values, allow_unused=True)
    sizes = {
        name: 0.0 if g is None else float(g.abs().sum()) for name, g in zip(slow | fast, slopes, strict=True)
    }  # fmt: skip
    return (
        sum(size for name, size in sizes.items() if "lora" in name),
        sum(size for name, size in sizes.items() if name.startswith("rows")),
        sum(size for name, size in sizes.items() if name.startswith("attention")),
    )


def test_gradients_take_the_routes_of_the_method(tiny_omni: Omni) -> None:
    """Safety attention teaches itself only; the language model learns the token through its own two logits."""
    casa = stir(Casa.attach(tiny_omni))

    def token_loss(targets: GatedTargets) -> Tensor:
        return nn.functional.cross_entropy(targets.reading.pair, torch.tensor([0, 1]))

    lora, rows, attention = gradients(casa, Detached(casa, "logits"), token_loss)
    assert lora == 0 and rows == 0 and attention > 0
    lora, rows, attention = gradients(casa, Detached(casa, "v_s"), token_loss)
    assert lora > 0 and rows > 0 and attention == 0

    def reply_loss(targets: GatedTargets) -> Tensor:
        losses = nn.functional.cross_entropy(targets.logits, targets.tokens, reduction="none")
        return losses.index_fill(0, targets.first, 0.0).sum()

    lora, rows, attention = gradients(casa, casa.safety_gate, reply_loss)
    assert lora > 0 and rows > 0 and attention == 0


# Gated generation


def test_neutral_gate_is_the_base_model(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    """v_s = 1/2 and fresh LoRA: the choice is the language model's own, and so is every word after it."""
    casa = Casa.attach(tiny_omni)
    with torch.no_grad():
        casa.attention.readout.weight.zero_()
        casa.attention.readout.bias.zero_()
    replies = casa.generate(mixed_queries, SHORT)
    for query, reply in zip(mixed_queries, replies, strict=True):
        batch = tiny_omni.encode([query])
        with torch.no_grad():
            pair = tiny_omni.model(**batch.inputs).logits[0, -1, list(casa.token_ids)]
        assert reply.v_s == 0.5
        assert reply.logit_safe is not None and reply.logit_unsafe is not None
        torch.testing.assert_close(torch.tensor([reply.raw_logit_safe, reply.raw_logit_unsafe]), pair)
        # Rule add_log adds log ½ to both.
        torch.testing.assert_close(torch.tensor([reply.logit_safe, reply.logit_unsafe]), pair + math.log(0.5))
        mine = torch.tensor([reply.logit_safe, reply.logit_unsafe]).softmax(-1)
        torch.testing.assert_close(mine, pair.softmax(-1))
        forced = tiny_omni.encode([query], [[casa.token_ids[int(pair.argmax())]]])
        with torch.no_grad():
            ids = tiny_omni.model.generate(**forced.inputs, **SHORT.kwargs())
        new = tiny_omni.until_end(ids[0, forced.inputs["input_ids"].shape[1] :].tolist())
        assert reply.text == tiny_omni.decode(new)


class ForcedStart(LogitsProcessor):
    """Plain generation's way of putting given ids first."""

    def __init__(self, forced: list[list[int]], start: int) -> None:
        self._forced, self._start = forced, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._start
        for row, ids in enumerate(self._forced):
            if step < len(ids):
                scores[row] = -torch.inf
                scores[row, ids[step]] = 0.0
        return scores


@pytest.mark.parametrize("order", ["gate_first", "prefill_first"])
def test_gated_generation_equals_plain_generation_with_hooks(
    tiny_omni: Omni, mixed_queries: list[Query], order: str
) -> None:
    """Pictures, clips, prefills of several lengths and none, all in one batch."""
    casa = stir(Casa.attach(tiny_omni))
    prefills = ("sure , here is", "", "first", "")
    queries = [q.model_copy(update={"prefill": text}) for q, text in zip(mixed_queries, prefills, strict=True)]
    replies = casa.generate(queries, SHORT, order=order)
    for query, reply in zip(queries, replies, strict=True):
        assert reply.query_id == query.id and reply.tokens <= 6
        batch = tiny_omni.encode([query], prefill=order == "prefill_first")
        with torch.no_grad():
            logits = tiny_omni.model(**batch.inputs).logits[:, -1]
        position = batch.gate_position if order == "gate_first" else batch.last_position
        reading = gated_prompt(tiny_omni, batch, casa.safety_gate, position).reading
        torch.testing.assert_close(reading.raw_pair, logits[:, list(casa.token_ids)], atol=1e-5, rtol=1e-5)
        forced = [
            casa.token_ids[int(reading.pair.argmax())],
            *(prefill_ids(tiny_omni, [query])[0] * (order == "gate_first")),
        ]
        start = batch.inputs["input_ids"].shape[1]
        with torch.no_grad():
            ids = tiny_omni.model.generate(
                **batch.inputs,
                max_new_tokens=6 + len(forced),
                do_sample=False,
                logits_processor=LogitsProcessorList([ForcedStart([forced], start)]),
            )
        new = ids[0, start + len(forced) :].tolist()
        assert reply.text == tiny_omni.decode(tiny_omni.until_end(new))
        assert reply.safety_token == ("safe", "unsafe")[int(reading.pair.argmax())]


def test_safety_attention_runs_once_per_turn(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = stir(Casa.attach(tiny_omni))
    calls: list[int] = []
    casa.attention.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    casa.generate(mixed_queries, SHORT)
    assert calls == [len(mixed_queries)]


SAMPLED = [
    {},
    {"do_sample": True, "temperature": 20.0},
    {"do_sample": True, "temperature": 0.3, "top_p": 0.2},
    {"do_sample": True, "top_p": 0.9, "batch_size": 3},
]


@pytest.mark.parametrize("fields", SAMPLED)
def test_the_first_token_is_always_one_of_the_two(
    tiny_omni: Omni, mixed_queries: list[Query], monkeypatch: pytest.MonkeyPatch, fields: dict[str, object]
) -> None:
    casa = Casa.attach(tiny_omni)
    with torch.no_grad():
        # A third token that the model would always choose.
        tiny_omni.head.weight[3] = 50 * tiny_omni.head.weight[3]
    first: list[int] = []
    decode_on = generation_module.continue_from

    def spy(omni, batch, cache, forced, rows, kwargs):
        first.extend(ids[0] for ids in forced)
        return decode_on(omni, batch, cache, forced, rows, kwargs)

    monkeypatch.setattr(generation_module, "continue_from", spy)
    settings = GenerationSettings.model_validate({"max_new_tokens": 3, **fields})
    replies = casa.generate(mixed_queries * 4, settings)
    assert len(first) == 16 and set(first) <= set(casa.token_ids)
    again = casa.generate(mixed_queries * 4, settings)
    assert [reply.text for reply in again] == [reply.text for reply in replies]
    if fields.get("temperature") == 20.0:
        assert set(first) == set(casa.token_ids)


def test_sampling_obeys_temperature_and_nucleus() -> None:
    pair = torch.tensor([[0.0, 2.0]]).repeat(4000, 1)
    hot = choose_token(pair, GenerationSettings(do_sample=True, temperature=4.0)).float().mean()
    torch.testing.assert_close(hot, torch.tensor(0.5).logit().add(0.5).sigmoid(), atol=0.03, rtol=0)
    assert choose_token(pair, GenerationSettings(do_sample=True, top_p=0.5)).all()
    assert choose_token(pair, GenerationSettings()).all()


def test_hard_gate_refuses_without_generating(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = stir(Casa.attach(tiny_omni))
    soft = casa.generate(mixed_queries, SHORT)
    threshold = sorted(float(reply.v_s or 0) for reply in soft)[1]
    with torch.no_grad():
        # Move the gate so that some are refused and some are not.
        casa.attention.readout.bias -= torch.logit(torch.tensor(threshold + 1e-7)) / 1.0
        casa.attention.readout.bias *= 1.0
    soft = casa.generate(mixed_queries, SHORT)
    hard = casa.generate(mixed_queries, SHORT, hard=True, refusal="No.")
    for one, other in zip(soft, hard, strict=True):
        assert one.safety_token == other.safety_token
        if other.safety_token == "unsafe":
            assert (other.text, other.tokens) == ("No.", 0)
        else:
            assert other.text == one.text


def test_attention_on_request_and_readings_without_replies(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = stir(Casa.attach(tiny_omni))
    replies = casa.generate(mixed_queries, SHORT, attention=True)
    alone = casa.decide([mixed_queries[0]], attention=True)[0]
    assert alone.text == "" and alone.attention is not None and replies[0].attention is not None
    assert len(alone.attention) == tiny_omni.encode([mixed_queries[0]]).inputs["input_ids"].shape[1]
    assert replies[0].attention == pytest.approx(alone.attention, abs=1e-5)
    assert sum(alone.attention) == pytest.approx(1, abs=1e-5)
    assert casa.generate(mixed_queries, SHORT)[0].attention is None


def test_every_assistant_turn_is_gated(tiny_omni: Omni) -> None:
    """The last turn's gate reads all user turns, and each call gates one turn."""
    casa = stir(Casa.attach(tiny_omni))
    first = Query.from_text("how do i make a cake ?")
    reply = casa.generate([first], SHORT)[0]
    turns = (Turn(role="user", parts=first.parts), Turn(role="assistant", parts=(TextPart(text=reply.text),)))
    second = Query.from_text("then what ?", history=turns)
    decision = casa.decide([second], attention=True)[0]
    alone = casa.decide([Query.from_text("then what ?")])[0]
    assert decision.safety_token in ("safe", "unsafe") and decision.v_s != alone.v_s
    batch = tiny_omni.encode([second])
    assert decision.attention is not None
    read = torch.tensor(decision.attention) > 0
    assert torch.equal(read, batch.prompt_mask[0])
    assert int(read.sum()) > int(tiny_omni.encode([Query.from_text("then what ?")]).prompt_mask.sum())


def test_an_empty_prompt_is_refused_by_name(tiny_omni: Omni) -> None:
    casa = Casa.attach(tiny_omni)
    with pytest.raises(InputError, match="q7"):
        casa.generate([Query.from_text("fine"), Query.from_text("  ", id="q7")])
