"""Replies behind the gate: choose the safety token under constraint, then let the model go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import LongTensor, Tensor
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


@dataclass
class Draft:
    """A reply in the making."""

    reply: Reply
    """As far as it is written."""
    before: list[int]
    """Ids that stand before it, where the safety token's place is; none for a reply of the base model."""
    ids: list[int]
    """Its own ids, up to the end of the turn."""
    by_base: bool = False
    """It is the base model's to write (`drop_after_safe`)."""
    final: bool = False
    """It is not to be decided on again: it follows the unsafe token directly, or ids that were forced."""


def gated_drafts(
    omni: Omni,
    gate: SafetyGate,
    queries: Sequence[Query],
    settings: GenerationSettings,
    use: GateUse,
    progress: bool | None = False,
    forced: Sequence[Sequence[int]] | None = None,
) -> list[Draft]:
    """A reply to each query, in their order, each with its safety token, v_s and the pair of logits, raw and rewritten.

    Those that `drop_after_safe` leaves to the base model have no text yet (see `write_as_base`).

    `forced`: for each query the ids that stand in the safety token's place before the reply, whatever the gate decides
    (an intervention on the token alone); the replies report the gate's own decision all the same.
    """
    queries = with_system(queries, settings.system)
    drafts: dict[int, Draft] = {}

    def answer(group: list[int]) -> list[Reply]:
        inserted = None if forced is None else [list(forced[index]) for index in group]
        written = _answer(omni, gate, [queries[index] for index in group], settings, use, inserted)
        drafts.update(zip(group, written, strict=True))
        return [draft.reply for draft in written]

    omni.in_batches(queries, settings, answer, progress=progress)
    return [drafts[index] for index in range(len(queries))]


def write_as_base(
    omni: Omni,
    queries: Sequence[Query],
    drafts: Sequence[Draft],
    settings: GenerationSettings,
    progress: bool | None = False,
) -> None:
    """Write the replies that are left to the base model, exactly as `Omni.generate` does; nothing may be attached."""
    rows = [row for row, draft in enumerate(drafts) if draft.by_base]
    left = with_system([queries[row] for row in rows], settings.system)
    ids_of: dict[int, list[int]] = {}

    def decode(group: list[int]) -> list[list[int]]:
        written = omni.write([left[index] for index in group], settings)
        ids_of.update(zip(group, written, strict=True))
        return written

    for index, reply in enumerate(omni.decoded(left, settings, decode, progress=progress)):
        draft = drafts[rows[index]]
        draft.ids = omni.until_end(ids_of[index])
        seconds = draft.reply.seconds + reply.seconds
        written = {"text": reply.text, "tokens": reply.tokens, "seconds": seconds}
        draft.reply = draft.reply.model_copy(update=written)


def gate_decisions(
    omni: Omni,
    gate: SafetyGate,
    queries: Sequence[Query],
    settings: GenerationSettings,
    use: GateUse,
    progress: bool | None = False,
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
    return batch, *decided(omni, gate, group, batch, position, settings, use, use_cache)


def decided(
    omni: Omni,
    gate: SafetyGate,
    group: list[Query],
    batch: OmniBatch,
    position: LongTensor,
    settings: GenerationSettings,
    use: GateUse,
    use_cache: bool,
) -> tuple[GatedPrompt, list[int]]:
    """The gate's forward over `batch`, the prompts of `group`, with its decision at `position` [batch]: 0 safe, 1
    unsafe for each.

    Raises:
        ModelError: v_s or a logit is not finite. InputError: a surface that the calibration lacks.
    """
    gate = gate.under(use.inference.inference_rule)
    prompt = gated_prompt(omni, batch, gate, position, use_cache, use.calibration.edits(batch, use.inference))
    check_decision("v_s", prompt.reading.v_s, group)
    check_decision("a safety token's logit", torch.cat([prompt.reading.raw_pair, prompt.reading.pair], dim=1), group)
    limits = use.calibration.limits(batch, use.inference)
    return prompt, choose_token(prompt.reading.pair, settings, use.threshold, limits).tolist()


def _answer(
    omni: Omni,
    gate: SafetyGate,
    group: list[Query],
    settings: GenerationSettings,
    use: GateUse,
    inserted: list[list[int]] | None = None,
) -> list[Draft]:
    began = time.perf_counter()
    batch, prompt, classes = _gated(omni, gate, group, settings, use, use_cache=True)
    replies = _decisions(group, batch, prompt, classes, use)
    tokens = inserted or [[int(gate.token_ids[index])] for index in classes]
    safe = [int(gate.token_ids[SAFE])]
    drafts = [Draft(reply, before, []) for reply, before in zip(replies, tokens, strict=True)]
    for query, draft, index in zip(group, drafts, classes, strict=True):
        draft.by_base = use.inference.drop_after_safe and draft.before == safe
        refused = index == UNSAFE and (use.refusal is not None or use.order == "prefill_first" or not query.prefill)
        draft.final = refused or inserted is not None
    refused_rows = [row for row in range(len(group)) if use.refusal is not None and classes[row] == UNSAFE]
    rows = [row for row, draft in enumerate(drafts) if row not in refused_rows and not draft.by_base]
    texts = dict.fromkeys(refused_rows, use.refusal or "")
    if rows:
        prefills = prefill_ids(omni, group) if use.order == "gate_first" else [[] for _ in group]
        forced = [[*tokens[row], *prefills[row]] for row in rows]
        kwargs = settings.kwargs() | {"logits_processor": finite_logits([group[row] for row in rows])}
        new = continue_from(omni, batch, prompt.cache, forced, rows, kwargs)
        for row, ids in zip(rows, new.tolist(), strict=True):
            drafts[row].ids = omni.until_end(ids)
            texts[row] = omni.decode(drafts[row].ids)
    seconds = (time.perf_counter() - began) / len(group)
    for row, draft in enumerate(drafts):
        draft.before = [] if draft.by_base else draft.before
        written = {"text": texts.get(row, ""), "tokens": len(draft.ids), "seconds": seconds}
        draft.reply = draft.reply.model_copy(update=written)
    return drafts


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
    """Replies without text: each query's safety token, v_s, and the two logits raw and rewritten."""
    reading = prompt.reading
    v_s, pair, raw_pair = reading.v_s.tolist(), reading.pair.tolist(), reading.raw_pair.tolist()
    # Without the padding, so that a reply's weights do not depend on its neighbours in the batch.
    real = batch.inputs["attention_mask"].bool()
    weights = [row[is_real].tolist() for row, is_real in zip(reading.attention, real, strict=True)]
    return [
        Reply(
            query_id=query.id,
            text="",
            safety_token="unsafe" if classes[row] == UNSAFE else "safe",
            v_s=v_s[row],
            logit_safe=pair[row][SAFE],
            logit_unsafe=pair[row][UNSAFE],
            raw_logit_safe=raw_pair[row][SAFE],
            raw_logit_unsafe=raw_pair[row][UNSAFE],
            attention=tuple(weights[row]) if use.attention else None,
        )
        for row, query in enumerate(group)
    ]
