"""Replies behind the gate: choose the safety token under constraint, then let the model go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from casa_mech.casa.attention import UNSAFE
from casa_mech.casa.gate import SafetyGate
from casa_mech.omni import GenerationSettings, Omni, OmniBatch, with_system
from casa_mech.omni.finite import check_decision, finite_logits
from casa_mech.queries import Query, Reply
from casa_mech.trace.gate import GatedPrompt, gated_prompt
from casa_mech.trace.generate import continue_from

Order = Literal["gate_first", "prefill_first"]
"""A: the gate decides right after the assistant's header, a prefill follows its token. B: the prefill follows the
header, and the gate decides after it, at the first step that is the model's own (method notes §1.8)."""


@dataclass(frozen=True)
class Behaviour:
    """How the gate is used. `order`: see `Order`; `refusal`: a fixed text for unsafe queries, which are then not
    generated for (hard gate), or None; `attention`: whether replies carry safety attention's weights; `threshold`: the
    share of the pair's probability above which the unsafe token is taken, or None for the likelier one."""

    order: Order = "gate_first"
    refusal: str | None = None
    attention: bool = False
    threshold: float | None = None


def choose_token(pair: Tensor, settings: GenerationSettings, threshold: float | None = None) -> Tensor:
    """Index [batch] of the safety token, from the rewritten logits `pair` [batch, 2]; all others are ruled out.

    Greedy or, as the rest of the reply, sampled with temperature and top-p; with a threshold, unsafe above it.
    """
    if threshold is not None:
        return (torch.softmax(pair, dim=-1)[:, UNSAFE] > threshold).long()
    if not settings.do_sample:
        return pair.argmax(dim=-1)
    no_ids = torch.zeros(pair.shape[0], 0, dtype=torch.long, device=pair.device)
    scores = TemperatureLogitsWarper(settings.temperature)(no_ids, pair)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(no_ids, scores)
    return torch.multinomial(torch.softmax(scores, dim=-1), 1)[:, 0]


def gated_replies(
    omni: Omni,
    gate: SafetyGate,
    queries: Sequence[Query],
    settings: GenerationSettings,
    behaviour: Behaviour,
    progress: bool = False,
    forced: Sequence[Sequence[int]] | None = None,
) -> list[Reply]:
    """A reply to each query, in their order, each with its safety token, v_s and the rewritten logits.

    `forced`: for each query the ids that stand in the safety token's place before the reply, whatever the gate decides
    (an intervention on the token alone); the replies report the gate's own decision all the same.
    """

    queries = with_system(queries, settings.system)

    def answer(group: list[int]) -> list[Reply]:
        inserted = None if forced is None else [list(forced[index]) for index in group]
        return _answer(omni, gate, [queries[index] for index in group], settings, behaviour, inserted)

    return omni.in_batches(queries, settings, answer, progress=progress)


def gate_readings(
    omni: Omni,
    gate: SafetyGate,
    queries: Sequence[Query],
    settings: GenerationSettings,
    behaviour: Behaviour,
    progress: bool = False,
) -> list[Reply]:
    """The gate's decision on each query, without a reply."""

    queries = with_system(queries, settings.system)

    def read(group: list[int]) -> list[Reply]:
        began = time.perf_counter()
        asked = [queries[index] for index in group]
        batch, prompt, chosen = _gated(omni, gate, asked, settings, behaviour, use_cache=False)
        found = _readings(asked, batch, prompt, chosen, behaviour)
        seconds = (time.perf_counter() - began) / len(group)
        return [reply.model_copy(update={"seconds": seconds}) for reply in found]

    return omni.in_batches(queries, settings, read, "gate", progress)


def _gated(
    omni: Omni,
    gate: SafetyGate,
    group: list[Query],
    settings: GenerationSettings,
    behaviour: Behaviour,
    use_cache: bool,
) -> tuple[OmniBatch, GatedPrompt, list[int]]:
    after_prefill = behaviour.order == "prefill_first"
    batch = omni.encode(group, prefill=after_prefill)
    position = batch.last_position if after_prefill else batch.gate_position
    prompt = gated_prompt(omni, batch, gate, position, use_cache)
    check_decision("v_s", prompt.reading.v_s, group)
    check_decision("a safety token's logit", torch.cat([prompt.reading.raw_pair, prompt.reading.pair], dim=1), group)
    return batch, prompt, choose_token(prompt.reading.pair, settings, behaviour.threshold).tolist()


def _answer(
    omni: Omni,
    gate: SafetyGate,
    group: list[Query],
    settings: GenerationSettings,
    behaviour: Behaviour,
    inserted: list[list[int]] | None = None,
) -> list[Reply]:
    began = time.perf_counter()
    batch, prompt, chosen = _gated(omni, gate, group, settings, behaviour, use_cache=True)
    replies = _readings(group, batch, prompt, chosen, behaviour)
    refused = [behaviour.refusal is not None and index == UNSAFE for index in chosen]
    rows = [row for row in range(len(group)) if not refused[row]]
    texts = dict.fromkeys(range(len(group)), (behaviour.refusal or "", 0))
    if rows:
        prefills = prefill_ids(omni, group) if behaviour.order == "gate_first" else [[] for _ in group]
        tokens = inserted or [[int(gate.token_ids[index])] for index in chosen]
        forced = [[*tokens[row], *prefills[row]] for row in rows]
        kwargs = settings.kwargs() | {"logits_processor": finite_logits([group[row] for row in rows])}
        new = continue_from(omni, batch, prompt.cache, forced, rows, kwargs)
        for row, ids in zip(rows, new.tolist(), strict=True):
            ids = omni.until_end(ids)
            texts[row] = (omni.decode(ids), len(ids))
    seconds = (time.perf_counter() - began) / len(group)
    return [
        reply.model_copy(update={"text": texts[row][0], "tokens": texts[row][1], "seconds": seconds})
        for row, reply in enumerate(replies)
    ]


def prefill_ids(omni: Omni, queries: Sequence[Query]) -> list[list[int]]:
    """Token ids of each query's prefill, exactly as a prompt that ends in it would hold them."""
    if not any(query.prefill for query in queries):
        return [[] for _ in queries]
    carriers = [Query.from_text(".", id=query.id, prefill=query.prefill) for query in queries]
    found: list[list[int]] = []
    batch = omni.encode(carriers)
    for row, (gate, last) in enumerate(zip(batch.gate_position.tolist(), batch.last_position.tolist(), strict=True)):
        found.append(batch.inputs["input_ids"][row, gate + 1 : last + 1].tolist())
    return found


def _readings(
    group: list[Query], batch: OmniBatch, prompt: GatedPrompt, chosen: list[int], behaviour: Behaviour
) -> list[Reply]:
    reading = prompt.reading
    v_s, pair = reading.v_s.tolist(), reading.pair.tolist()
    # Without the padding, so that a reply's weights do not depend on its neighbours in the batch.
    real = batch.inputs["attention_mask"].bool()
    weights = [row[keep].tolist() for row, keep in zip(reading.attention, real, strict=True)]
    return [
        Reply(
            query_id=query.id,
            text="",
            safety_token="unsafe" if chosen[row] == UNSAFE else "safe",
            v_s=v_s[row],
            logit_safe=pair[row][0],
            logit_unsafe=pair[row][1],
            attention=tuple(weights[row]) if behaviour.attention else None,
        )
        for row, query in enumerate(group)
    ]
