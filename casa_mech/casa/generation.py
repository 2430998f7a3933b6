"""Replies behind the gate: choose the safety token under constraint, then let the model go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from casa_mech.casa.attention import SAFE, UNSAFE
from casa_mech.casa.calibration import Calibration
from casa_mech.casa.config import InferenceSettings
from casa_mech.casa.gate import SafetyGate
from casa_mech.omni import GenerationSettings, Omni, OmniBatch, with_system
from casa_mech.omni.finite import check_decision, finite_logits
from casa_mech.queries import Query, Reply
from casa_mech.trace.gate import GatedPrompt, gated_prompt
from casa_mech.trace.generate import continue_from

Order = Literal["gate_first", "prefill_first"]
"""With a prefill: "gate_first", the gate decides right after the assistant's header and the prefill follows its token;
"prefill_first", the prefill follows the header and the gate decides after it, at the first step that is the model's own
(docs/method.md §1.8)."""


@dataclass(frozen=True)
class GateUse:
    """How the gate is used."""

    order: Order = "gate_first"
    """When it decides, where there is a prefill."""
    refusal: str | None = None
    """A fixed reply to unsafe queries, in the place of a generated one (hard gate), or None."""
    attention: bool = False
    """Put safety attention's weights into the replies."""
    threshold: float | None = None
    """The share of the pair's probability above which the unsafe token is taken; None for the likelier token."""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """What is done beyond the paper."""
    calibration: Calibration = field(default_factory=Calibration)
    """What that was fitted on."""


def choose_token(
    pair: Tensor, settings: GenerationSettings, threshold: float | None = None, limits: Tensor | None = None
) -> Tensor:
    """Class [batch] (0 safe, 1 unsafe) of the safety token, from the rewritten logits `pair` [batch, 2].

    Greedy or, as the rest of the reply, sampled with temperature and top-p; with a threshold on the unsafe token's
    share, or else with `limits` [batch] on the log-odds, unsafe above it.
    """
    if threshold is not None:
        return (torch.softmax(pair, dim=-1)[:, UNSAFE] > threshold).long()
    if limits is not None:
        return (pair[:, UNSAFE] - pair[:, SAFE] > limits).long()
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
    use: GateUse,
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
        return _answer(omni, gate, [queries[index] for index in group], settings, use, inserted)

    return omni.in_batches(queries, settings, answer, progress=progress)


def gate_decisions(
    omni: Omni,
    gate: SafetyGate,
    queries: Sequence[Query],
    settings: GenerationSettings,
    use: GateUse,
    progress: bool = False,
) -> list[Reply]:
    """The gate's decision on each query, without a reply."""

    queries = with_system(queries, settings.system)

    def read(group: list[int]) -> list[Reply]:
        began = time.perf_counter()
        members = [queries[index] for index in group]
        batch, prompt, classes = _gated(omni, gate, members, settings, use, use_cache=False)
        replies = _decisions(members, batch, prompt, classes, use)
        seconds = (time.perf_counter() - began) / len(group)
        return [reply.model_copy(update={"seconds": seconds}) for reply in replies]

    return omni.in_batches(queries, settings, read, "gate", progress)


def _gated(
    omni: Omni,
    gate: SafetyGate,
    group: list[Query],
    settings: GenerationSettings,
    use: GateUse,
    use_cache: bool,
) -> tuple[OmniBatch, GatedPrompt, list[int]]:
    after_prefill = use.order == "prefill_first"
    batch = omni.encode(group, prefill=after_prefill)
    position = batch.last_position if after_prefill else batch.gate_position
    prompt = gated_prompt(omni, batch, gate, position, use_cache, use.calibration.edits(batch, use.inference))
    check_decision("v_s", prompt.reading.v_s, group)
    check_decision("a safety token's logit", torch.cat([prompt.reading.raw_pair, prompt.reading.pair], dim=1), group)
    limits = use.calibration.limits(batch, use.inference)
    return batch, prompt, choose_token(prompt.reading.pair, settings, use.threshold, limits).tolist()


def _answer(
    omni: Omni,
    gate: SafetyGate,
    group: list[Query],
    settings: GenerationSettings,
    use: GateUse,
    inserted: list[list[int]] | None = None,
) -> list[Reply]:
    began = time.perf_counter()
    batch, prompt, classes = _gated(omni, gate, group, settings, use, use_cache=True)
    replies = _decisions(group, batch, prompt, classes, use)
    rows = [row for row in range(len(group)) if use.refusal is None or classes[row] != UNSAFE]
    texts = dict.fromkeys(range(len(group)), (use.refusal or "", 0))
    if rows:
        prefills = prefill_ids(omni, group) if use.order == "gate_first" else [[] for _ in group]
        tokens = inserted or [[int(gate.token_ids[index])] for index in classes]
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
    batch = omni.encode(carriers)
    ends = zip(batch.gate_position.tolist(), batch.last_position.tolist(), strict=True)
    return [batch.inputs["input_ids"][row, gate + 1 : last + 1].tolist() for row, (gate, last) in enumerate(ends)]


def _decisions(
    group: list[Query], batch: OmniBatch, prompt: GatedPrompt, classes: list[int], use: GateUse
) -> list[Reply]:
    """Replies without text: each query's safety token, v_s and rewritten logits."""
    reading = prompt.reading
    v_s, pair = reading.v_s.tolist(), reading.pair.tolist()
    # Without the padding, so that a reply's weights do not depend on its neighbours in the batch.
    real = batch.inputs["attention_mask"].bool()
    weights = [row[is_real].tolist() for row, is_real in zip(reading.attention, real, strict=True)]
    return [
        Reply(
            query_id=query.id,
            text="",
            safety_token="unsafe" if classes[row] == UNSAFE else "safe",
            v_s=v_s[row],
            logit_safe=pair[row][0],
            logit_unsafe=pair[row][1],
            attention=tuple(weights[row]) if use.attention else None,
        )
        for row, query in enumerate(group)
    ]
