"""What a gate says of a query does not depend on the other queries: batch, padding and number of processes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.casa import SHORT
from helpers.kills import killed
from torch.nn import functional

from casa_mech.attacks import apply_attack
from casa_mech.casa import Casa, TrainSettings
from casa_mech.errors import InputError
from casa_mech.evaluation.envelope import batch_envelope
from casa_mech.omni import GenerationSettings, OmniBatch, load_omni
from casa_mech.organism.wording import MICRO_WORLD
from casa_mech.organism.world import default_world
from casa_mech.queries import Query, Reply
from casa_mech.trace.gate import gated_prompt

CLOSE = 1e-5
"""Largest change of a number in float32."""


def numbers(replies: list[Reply]) -> torch.Tensor:
    return torch.tensor([[reply.v_s, reply.logit_safe, reply.logit_unsafe] for reply in replies], dtype=torch.float64)


def same(found: list[Reply], wanted: list[Reply]) -> None:
    assert [reply.safety_token for reply in found] == [reply.safety_token for reply in wanted]
    # Of logits of about 10 float32 tells 1e-6 apart: theirs is a relative change.
    torch.testing.assert_close(numbers(found), numbers(wanted), atol=CLOSE, rtol=CLOSE)


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    """Micro-world requests of several lengths, on all surfaces."""
    asked = default_world().requests(6, seed=1)
    tokenizer = load_omni("organism", device="cpu").tokenizer
    surfaces = ("plain", "spelled", "image", "audio", "jailbreak")
    return [
        query.model_copy(update={"id": f"{surface}-{query.id}"})
        for surface in surfaces
        for query in apply_attack(surface, asked, 1, tokenizer=tokenizer, wording=MICRO_WORLD)
    ]


@pytest.fixture(scope="module")
def casa() -> Casa:
    """A gate on the shipped organism, trained for a few seconds."""
    casa = Casa.attach(load_omni("organism", device="cpu"))
    settings = TrainSettings(max_steps=25, batch_size=16, precision="full", validation=0.0)
    casa.train(default_world().training_examples(128, seed=3), settings, progress=False)
    return casa


@pytest.fixture(scope="module")
def alone(casa: Casa, queries: list[Query]) -> list[Reply]:
    replies = [casa.decide([query])[0] for query in queries]
    assert {reply.safety_token for reply in replies} == {"safe", "unsafe"}
    assert len({round(reply.v_s or 0, 2) for reply in replies}) > 5
    return replies


def test_neither_batch_size_nor_neighbours_matter(casa: Casa, queries: list[Query], alone: list[Reply]) -> None:
    for size in (3, 8, 30):
        same(casa.decide(queries, GenerationSettings(batch_size=size)), alone)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), 7):
        places = order[start : start + 7]
        same(casa.decide([queries[place] for place in places]), [alone[place] for place in places])


def test_replies_are_the_same_words(casa: Casa, queries: list[Query]) -> None:
    one, many = (casa.generate(queries, SHORT.model_copy(update={"batch_size": size})) for size in (1, 11))
    assert [reply.text for reply in one] == [reply.text for reply in many]


def padded(batch: OmniBatch, left: int, right: int, word: int) -> OmniBatch:
    """The batch with columns of padding on both sides, which hold a real word's id behind the mask."""
    sides = (left, right)
    return replace(
        batch,
        inputs=batch.inputs
        | {
            "input_ids": functional.pad(batch.inputs["input_ids"], sides, value=word),
            "attention_mask": functional.pad(batch.inputs["attention_mask"], sides),
        },
        prompt_mask=functional.pad(batch.prompt_mask, sides),
        modality={name: functional.pad(mask, sides) for name, mask in batch.modality.items()},
        gate_position=batch.gate_position + left,
        last_position=batch.last_position + left,
    )


@pytest.mark.parametrize(("left", "right"), [(9, 0), (0, 9), (4, 3)])
def test_neither_side_nor_amount_of_padding_matters(
    casa: Casa, queries: list[Query], alone: list[Reply], left: int, right: int
) -> None:
    (word,) = casa.omni.tokenizer("make", add_special_tokens=False)["input_ids"]
    for place in range(0, len(queries), 5):
        batch = padded(casa.omni.encode([queries[place]], prefill=False), left, right, word)
        reading = gated_prompt(casa.omni, batch, casa.safety_gate, batch.gate_position, use_cache=False).reading
        found = torch.cat([reading.v_s[:, None], reading.pair], dim=1).double()
        torch.testing.assert_close(found, numbers(alone[place : place + 1]), atol=CLOSE, rtol=CLOSE)
        assert (reading.pair.argmax() == 1) == (alone[place].safety_token == "unsafe")


@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_the_number_of_processes_does_not_matter(
    casa: Casa, queries: list[Query], alone: list[Reply], tmp_path: Path
) -> None:
    for processes in (2, 3):
        found: list[Reply] = []
        for number in range(processes):
            share, out = queries[number::processes], tmp_path / f"{processes}-{number}.json"
            work = lambda share=share, out=out: out.write_text(  # noqa: E731
                json.dumps([reply.model_dump(mode="json") for reply in casa.decide(share)])
            )
            killed(work, None, tmp_path / "log.txt")
            found += [Reply(**reply) for reply in json.loads(out.read_text())]
        order = [place for number in range(processes) for place in range(number, len(queries), processes)]
        same(found, [alone[place] for place in order])


def test_the_envelope_of_batches(casa: Casa, queries: list[Query], tmp_path: Path) -> None:
    envelope = batch_envelope(casa, queries)
    assert (envelope.dtype, envelope.n, envelope.decisions) == ("float32", len(queries), 0)
    assert envelope.v_s < CLOSE and envelope.log_odds < 10 * CLOSE
    casa.save_pretrained(tmp_path / "gate")
    half = load_omni("organism", device="cpu", dtype="bfloat16")
    with pytest.warns(UserWarning, match="not on these weights"):  # the rounded ones
        halved = Casa.from_pretrained(tmp_path / "gate", half)
    halves = batch_envelope(halved, queries)
    print(envelope, halves)
    assert halves.dtype == "bfloat16" and CLOSE < halves.v_s < 0.1
    with pytest.raises(InputError, match="at least one query"):
        batch_envelope(casa, [])
