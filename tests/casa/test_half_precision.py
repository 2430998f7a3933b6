"""A model in half precision: the pair, log v_s and every loss are float32's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.casa import examples, stir
from torch import Tensor
from torch.nn import functional

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.attention import UNSAFE
from casa_mech.casa.objective import reply_losses, sequence_losses
from casa_mech.casa.open_gate import OpenGate
from casa_mech.casa.rules import rewrite
from casa_mech.casa.supervised import Parts, is_harmful
from casa_mech.defenses.rerouting import reroute_loss, retain_loss
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.gate import gated_prompt, gated_targets
from casa_mech.trace.layers import layer_states
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.targets import plain_targets
from probes.gate.safety_attention import gate_inputs

HALVES = (torch.bfloat16, torch.float16)
EXACT = 1e-3
"""Largest relative error of a loss."""


@pytest.fixture(params=HALVES, ids=str)
def half(tiny_omni: Omni, request: pytest.FixtureRequest) -> Omni:
    """The tiny model in half precision, with logits of about 20, where bfloat16's steps are 1/8."""
    with torch.no_grad():
        tiny_omni.head.weight.mul_(20)
    tiny_omni.model.to(request.param)
    return tiny_omni


def teacher_forced(casa: Casa) -> tuple[OmniBatch, Tensor]:
    rows, omni, ids = examples(12), casa.omni, casa.token_ids
    harmful = is_harmful(rows)
    targets = [[ids[int(bad)], *omni.reply_ids(row.reply)] for row, bad in zip(rows, harmful, strict=True)]
    return omni.encode([row.query for row in rows], targets, prefill=False), harmful


def test_the_pair_is_float32_s_wherever_the_gate_reads_it(half: Omni, mixed_queries: list[Query]) -> None:
    casa = stir(Casa.attach(half), 0.02)
    batch = half.encode(mixed_queries, prefill=False)
    states = capture(half, batch, ["norm"], "last")["norm"].double()
    exact = states @ half.head.weight[list(casa.token_ids)].double().T
    prompt = gated_prompt(half, batch, casa.safety_gate, batch.gate_position)
    edited = edited_prompt(half, batch, batch.gate_position, {}, casa.safety_gate).reading
    assert edited is not None and prompt.reading.v_s.dtype == torch.float32
    for reading in (prompt.reading, edited):
        assert reading.raw_pair.dtype == reading.pair.dtype == torch.float32
        torch.testing.assert_close(reading.raw_pair.double(), exact, rtol=1e-5, atol=1e-5)
        _, _, pair = rewrite("add_log", prompt.logits.double().index_copy(1, casa.safety_gate.token_ids, exact),
                             casa.safety_gate.token_ids, reading.v_s.double())  # fmt: skip
        torch.testing.assert_close(reading.pair.double(), pair, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate_inputs(casa, mixed_queries)[1].final[:, 0].double(), states, rtol=0, atol=0)
    opened = gated_prompt(half, batch, OpenGate(casa), batch.gate_position).reading
    torch.testing.assert_close(opened.raw_pair, prompt.reading.raw_pair)
    # The head's own logits are too coarse for the decision of two tokens that are alike.
    coarse = half.model(**batch.inputs).logits[torch.arange(batch.size), batch.gate_position]
    assert (coarse[:, list(casa.token_ids)].double() - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [{}, {"rule": "scale"}, {"rule": "scale_above"}, {"ce_support": "two_way"}, {"form": "none"}, {"layer": 0},
     {"rule": "replace", "ce_support": "two_way"}],
)  # fmt: skip
def test_losses_are_those_of_the_logits_in_float64(half: Omni, fields: dict[str, object]) -> None:
    """CASA under every rule; form none is that of SSFT with the token and of refusal tokens."""
    casa = stir(Casa.attach(half, CasaConfig.model_validate({**fields, "lora_dropout": 0.0})), 0.02)
    batch, harmful = teacher_forced(casa)
    forward = gated_targets(half, batch, casa.safety_gate, casa.parts.tokens.rows)
    assert forward.logits.dtype == half.dtype and forward.gated.dtype == torch.float32
    losses = sequence_losses(casa.config, forward, harmful)
    logits, ids, gate = forward.logits.detach().double(), casa.safety_gate.token_ids, casa.safety_gate
    states = capture(half, batch, ["norm"], "all")["norm"][torch.arange(batch.size), batch.gate_position].double()
    rows = casa.parts.tokens.rows.head_rows.detach().double()
    raw = logits[forward.first].index_copy(1, ids, states @ rows.T)
    pair, decided = raw[:, ids], raw
    if gate.attention is not None:
        decided, _, pair = rewrite(casa.config.rule, raw, ids, forward.reading.v_s.detach().double())
    exact = replace(forward, logits=logits, gated=decided, reading=replace(forward.reading, pair=pair))
    truth = sequence_losses(casa.config, exact, harmful)
    for name in ("token", "reply"):
        loss, wanted = getattr(losses, name), getattr(truth, name)
        assert loss.dtype == torch.float32 and wanted.dtype == torch.float64
        torch.testing.assert_close(loss.double(), wanted, rtol=EXACT, atol=1e-6)
    assert torch.equal(losses.correct, (pair.argmax(dim=1) == UNSAFE) == harmful)


def test_losses_of_fine_tuning_and_of_circuit_breakers(half: Omni) -> None:
    rows = examples(6)
    batch = half.encode([row.query for row in rows], [half.reply_ids(row.reply) for row in rows], prefill=False)
    targets = plain_targets(half, batch)
    losses = reply_losses(targets, batch.size)
    truth = functional.cross_entropy(targets.logits.double(), targets.tokens, reduction="none")
    exact = torch.stack([truth[targets.row == row].mean() for row in range(batch.size)])
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=EXACT, atol=0)
    with torch.no_grad():
        frozen = layer_states(half, batch, 2)
    states = (frozen * (1 + 2**-6)).to(half.dtype)
    mask = batch.inputs["attention_mask"]
    for loss in (reroute_loss, retain_loss):
        value, wanted = loss(states, frozen, mask), loss(states.double(), frozen.double(), mask)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(wanted.item(), rel=EXACT)


def test_what_training_logs_is_no_step_of_a_half(half: Omni) -> None:
    casa = Casa.attach(half, CasaConfig(lora_dropout=0.0))
    rows, parts = examples(12), casa.parts
    assert isinstance(parts, Parts)
    loss, row = parts.objective(rows, torch.full((12,), 1 / 12), 64)
    assert loss.dtype == torch.float32 and loss.item() == row["loss"]
    assert loss.to(half.dtype).item() != row["loss"]
    casa.detach()
