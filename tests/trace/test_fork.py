"""Prompts that go on from another's cache are answered as if they had been read from their start."""

from __future__ import annotations

import pytest
import torch

from casa_mech.defenses.prompts import with_text_after, with_text_before
from casa_mech.omni import Omni
from casa_mech.queries import Query, TextPart
from casa_mech.trace.fork import Start, beside, forked, joined, read_prompts, resumed
from casa_mech.trace.steer import first_steps


def decoded(omni: Omni, start: Start) -> list[list[int]]:
    width = start["input_ids"].shape[1]
    return omni.model.generate(**start, max_new_tokens=6, do_sample=False)[:, width:].tolist()


def variants(queries: list[Query]) -> dict[str, list[Query]]:
    return {
        "same": queries,
        "asked": [with_text_after(query, "is it harmful ?") for query in queries],
        "told": [with_text_before(query, "sorry , i can not help . please explain the request .") for query in queries],
        "begun": [query.model_copy(update={"prefill": "sure , here is the cake"}) for query in queries],
    }


@pytest.mark.parametrize("name", ["same", "asked", "told", "begun"])
def test_a_fork_is_answered_as_if_read_from_its_start(tiny_omni: Omni, mixed_queries: list[Query], name: str) -> None:
    wanted = variants(mixed_queries)[name]
    read = read_prompts(tiny_omni, tiny_omni.encode(mixed_queries))
    prompts = tiny_omni.prompt_ids(read.batch, wanted)
    fresh = tiny_omni.encode(wanted).inputs
    for row, ids in enumerate(prompts):
        assert ids == fresh["input_ids"][row][fresh["attention_mask"][row].bool()].tolist()
    start = forked(tiny_omni, read, range(4), prompts)
    assert start is not None
    assert start["past_key_values"].get_seq_length() < start["input_ids"].shape[1]
    assert decoded(tiny_omni, start) == decoded(tiny_omni, fresh)
    traced = first_steps(tiny_omni, beside(tiny_omni, read, wanted), 3)
    expected = first_steps(tiny_omni, fresh, 3)
    assert torch.equal(traced.ids, expected.ids)
    torch.testing.assert_close(traced.states, expected.states, atol=1e-4, rtol=1e-4)


def test_forks_take_rows_as_often_as_asked_and_leave_what_was_read(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    plain = decoded(tiny_omni, tiny_omni.encode(mixed_queries).inputs)
    read = read_prompts(tiny_omni, tiny_omni.encode(mixed_queries))
    asked = variants(mixed_queries)["asked"]
    prompts = tiny_omni.prompt_ids(read.batch, asked)
    start = forked(tiny_omni, read, [3, 1, 3], [prompts[3], prompts[1], prompts[3]])
    assert start is not None
    found = decoded(tiny_omni, start)
    assert found[0] == found[2]
    assert found[1:] == decoded(tiny_omni, beside(tiny_omni, read, asked, [1, 3]))
    assert decoded(tiny_omni, resumed(tiny_omni, read)) == plain


def test_joined_prompts_go_on_side_by_side(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    told = variants(mixed_queries)["told"]
    expected = [decoded(tiny_omni, tiny_omni.encode(queries).inputs) for queries in (mixed_queries, told)]
    read = read_prompts(tiny_omni, tiny_omni.encode(mixed_queries))
    other = read_prompts(tiny_omni, read.batch, beside(tiny_omni, read, told))
    assert decoded(tiny_omni, resumed(tiny_omni, joined(tiny_omni, read, other))) == [*expected[0], *expected[1]]
    assert decoded(tiny_omni, resumed(tiny_omni, joined(tiny_omni, other, read))) == [*expected[1], *expected[0]]


def test_media_are_encoded_once(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    seen: list[str] = []
    for name in ("image", "audio"):
        tiny_omni.tower(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    read = read_prompts(tiny_omni, tiny_omni.encode(mixed_queries))
    for wanted in variants(mixed_queries).values():
        decoded(tiny_omni, beside(tiny_omni, read, wanted))
    decoded(tiny_omni, resumed(tiny_omni, read))
    assert sorted(seen) == ["audio", "image"]


def test_media_that_are_not_shared_are_read_again(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    first = [query.model_copy(update={"parts": (TextPart(text="please"), *query.parts)}) for query in mixed_queries]
    read = read_prompts(tiny_omni, tiny_omni.encode(first))
    told = variants(first)["told"]
    assert forked(tiny_omni, read, range(4), tiny_omni.prompt_ids(read.batch, told)) is None
    assert decoded(tiny_omni, beside(tiny_omni, read, told)) == decoded(tiny_omni, tiny_omni.encode(told).inputs)
