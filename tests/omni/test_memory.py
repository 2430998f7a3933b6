"""Too large for the memory: blocks that are computed again, forwards by tokens, batches that are halved and say so."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.casa import SETTINGS, SHORT, examples, stir

from casa_mech.casa import Casa, CasaConfig
from casa_mech.casa.objective import class_weights
from casa_mech.casa.supervised import Parts, Supervised, is_harmful, within
from casa_mech.defenses.circuit_breaker import CircuitBreaker
from casa_mech.defenses.rerouting import CircuitBreakerSettings
from casa_mech.errors import InputError, RunError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.omni.memory import in_halves, is_out_of_memory, recomputed_blocks
from casa_mech.omni.precision import bfloat16_products
from casa_mech.queries import Example, Query
from probes.activations import ActivationStore

FULL = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


def with_completions(n: int = 24) -> list[Example]:
    """Examples whose harmful queries have the completion that circuit breakers reroute."""
    return [
        row.model_copy(update={"query": row.query.model_copy(update={"meta": {"compliance": "first make the bomb ."}})})
        for row in examples(n)
    ]


class Small:
    """A first block that has room for so many rows, and notes how many it is given."""

    def __init__(self, omni: Omni, room: int) -> None:
        self.rows: list[int] = []

        def forward(module: torch.nn.Module, args: tuple[torch.Tensor, ...], options: dict[str, object]) -> None:
            self.rows.append(len(args[0]))
            if len(args[0]) > room:
                raise RuntimeError(FULL)

        omni.blocks[0].register_forward_pre_hook(forward, with_kwargs=True)


def test_what_running_out_of_memory_looks_like() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert is_out_of_memory(RuntimeError(FULL)) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(RunError("out of memory with one example a forward"))


def test_groups_are_halved_once_and_for_all() -> None:
    tried: list[list[int]] = []

    def work(group: list[int]) -> int:
        tried.append(group)
        if len(group) > 3:
            raise MemoryError
        return sum(group)

    groups = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]
    with pytest.warns(UserWarning, match="out of memory: going on with [42] queries a forward") as said:
        found = list(in_halves(groups, work))
    assert found == [([0, 1], 1), ([2, 3], 5), ([4, 5], 9), ([6, 7], 13), ([8, 9], 17), ([10, 11], 21), ([12], 12)]
    halved = [warning for warning in said if "out of memory" in str(warning.message)]  # others may come beside
    assert len(halved) == 2 and sum(len(group) > 2 for group in tried) == 2
    with pytest.raises(MemoryError):
        list(in_halves([[4]], lambda group: work(group * 4)))
    with pytest.raises(ZeroDivisionError):
        list(in_halves([[1, 2]], lambda group: 1 // 0))


def test_replies_decisions_and_states_of_halved_batches(
    tiny_omni: Omni, mixed_queries: list[Query], tmp_path: Path
) -> None:
    casa = stir(Casa.attach(tiny_omni))
    replies, decisions = casa.generate(mixed_queries, SHORT), casa.decide(mixed_queries)
    states = ActivationStore.collect(tiny_omni, mixed_queries, ["norm"], "last", tmp_path / "whole")
    Small(tiny_omni, 2)
    with pytest.warns(UserWarning, match="out of memory: going on with 2 queries a forward"):
        halved = casa.generate(mixed_queries, SHORT)
    assert [reply.text for reply in halved] == [reply.text for reply in replies]
    with pytest.warns(UserWarning, match="out of memory"):
        again = casa.decide(mixed_queries)
    assert [reply.v_s for reply in again] == pytest.approx([reply.v_s for reply in decisions], abs=1e-5)
    with pytest.warns(UserWarning, match="out of memory"):
        store = ActivationStore.collect(tiny_omni, mixed_queries, ["norm"], "last", tmp_path / "halved")
    np.testing.assert_allclose(store.tensor("norm", "last"), states.tensor("norm", "last"), atol=1e-5)
    Small(tiny_omni, 0)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(RuntimeError, match="can't allocate"):
        casa.decide(mixed_queries)


@pytest.mark.parametrize("fields", [{}, {"forward_tokens": 300}])
def test_a_step_that_does_not_fit_is_made_in_halves(tiny_omni: Omni, fields: dict[str, int]) -> None:
    """The same step but for rounding, validation included; dropout is off, whose draws differ."""
    casa = Casa.attach(tiny_omni, CasaConfig(lora_dropout=0.0))
    settings = SETTINGS.model_copy(update={"max_steps": 4, "validation": 0.3, **fields})
    whole = casa.train(examples(), settings, progress=False)
    casa.detach()
    casa = Casa.attach(tiny_omni, CasaConfig(lora_dropout=0.0))
    small = Small(tiny_omni, 2)
    with pytest.warns(UserWarning, match="out of memory: going on with") as said:
        halved = casa.train(examples(), settings, progress=False)
    assert {str(warning.message).split(" with ")[1] for warning in said} <= {
        "4 examples a forward", "2 examples a forward", "150 tokens a forward", "75 tokens a forward",
        "37 tokens a forward",
    }  # fmt: skip
    assert max(small.rows[-4:]) <= 2
    for row, other in zip(halved, whole, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    Small(tiny_omni, 0)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(RunError, match="one example a forward: set gradient_checkpointing"),
    ):
        casa.train(examples(), settings, progress=False)


def test_rerouting_is_halved_too(tiny_omni: Omni) -> None:
    """Its losses are means over padding, too, so halves are held against a run with parts of that size."""
    settings = CircuitBreakerSettings(max_steps=2, batch_size=4, lora_dropout=0.0)
    breaker = CircuitBreaker(tiny_omni, settings.model_copy(update={"micro_batch_size": 2}))
    whole = breaker.train(with_completions(), progress=False)
    breaker.close()
    breaker = CircuitBreaker(tiny_omni, settings.model_copy(update={"gradient_checkpointing": True}))
    Small(tiny_omni, 2)
    with pytest.warns(UserWarning, match="going on with 2 sequences a forward"):
        halved = breaker.train(with_completions(), progress=False)
    for name in ("reroute", "retain", "loss"):
        assert [row[name] for row in halved] == pytest.approx([row[name] for row in whole], rel=1e-5)


@pytest.mark.parametrize("layer", ["norm", 0])
@pytest.mark.parametrize("halved", [False, True])
def test_gradients_of_recomputed_blocks_are_the_same(tiny_omni: Omni, layer: str | int, halved: bool) -> None:
    """Bit for bit, with dropout; and the blocks are in fact run twice."""
    casa, rows = stir(Casa.attach(tiny_omni, CasaConfig.model_validate({"layer": layer}))), examples(12)
    weights = [weight for group in casa.parts.groups() for weight in group.values()]
    calls: list[int] = []
    tiny_omni.blocks[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for context in (nullcontext(), recomputed_blocks(tiny_omni.model)):
        tiny_omni.model.train()
        torch.manual_seed(3)
        with context, bfloat16_products(tiny_omni) if halved else nullcontext():
            loss, _ = casa.parts.objective(rows, class_weights(is_harmful(rows), 0.5), 64)
            gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    assert len(calls) == 3
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert not tiny_omni.model.is_activation_checkpointing


def test_checkpointed_training_is_the_same_training(tiny_omni: Omni) -> None:
    logs = []
    for on in (False, True):
        casa = Casa.attach(tiny_omni)
        settings = SETTINGS.model_copy(update={"gradient_checkpointing": on})
        logs.append([row["loss"] for row in casa.train(examples(), settings, progress=False)])
        casa.detach()
    assert logs[0] == logs[1]


def test_forwards_hold_so_many_tokens_of_like_length(tiny_omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    assert within([5, 1, 4, 1, 9, 2], 8) == [[1, 3, 5], [2], [0], [4]]
    assert within([], 8) == []
    casa, sizes = Casa.attach(tiny_omni, CasaConfig(lora_dropout=0.0)), list[tuple[int, int]]()
    encode = Omni.encode

    def noted(self: Omni, *arguments: object, **options: object) -> OmniBatch:
        batch = encode(self, *arguments, **options)  # type: ignore[arg-type]
        sizes.append(tuple(batch.inputs["input_ids"].shape))  # type: ignore[arg-type]
        return batch

    settings = SETTINGS.model_copy(update={"validation": 0.0, "batch_size": 16, "max_steps": 1})
    whole = casa.train(examples(), settings, progress=False)[0]
    casa.detach()
    monkeypatch.setattr(Omni, "encode", noted)
    casa = Casa.attach(tiny_omni, CasaConfig(lora_dropout=0.0))
    sizes.clear()
    row = casa.train(examples(), settings.model_copy(update={"forward_tokens": 120}), progress=False)[0]
    assert sum(rows for rows, _ in sizes) == 16 and len(sizes) > 2
    assert all(rows * length <= 120 for rows, length in sizes)
    assert [length for _, length in sizes] == sorted(length for _, length in sizes)
    assert (row["loss"], row["grad_norm"]) == pytest.approx((whole["loss"], whole["grad_norm"]), rel=1e-4)
    with pytest.raises(InputError, match="forward_tokens"):
        type(settings)(forward_tokens=0)
    assert isinstance(casa.parts, Parts) and Supervised(casa.parts, examples(), settings).halve() == ""
