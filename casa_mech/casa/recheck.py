"""Decisions in the middle of a reply: the assistant's header is inserted anew and the gate decides at it once more.

After any-depth alignment (arXiv 2510.18081; docs/method.md §1.10). The replies are there already; what a re-check flags
is cut there and goes on with a refusal, which is what checking while decoding would have come to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from casa_mech.casa.attention import SAFE, UNSAFE
from casa_mech.casa.gate import SafetyGate
from casa_mech.casa.generation import Draft, GateUse, decided, prefill_ids
from casa_mech.omni import GenerationSettings, Omni, OmniBatch, with_system
from casa_mech.omni.finite import finite_logits
from casa_mech.queries import Query, Reply
from casa_mech.trace.generate import continue_from


def recheck(
    omni: Omni,
    gate: SafetyGate,
    queries: Sequence[Query],
    drafts: Sequence[Draft],
    settings: GenerationSettings,
    use: GateUse,
    progress: bool | None = False,
) -> None:
    """Decide again after a prefill and after every `recheck_every` tokens of each reply that goes on behind them.

    A reply that is flagged keeps what stands before, and a refusal follows the unsafe token, within the same number of
    new tokens; it reports the decision that stopped it. Each re-check is a forward over prompt and reply so far.
    """
    queries = with_system(queries, settings.system)
    still_open = [row for row, draft in enumerate(drafts) if not draft.final]
    for depth in range(0, settings.max_new_tokens, use.inference.recheck_every):
        rows = [row for row in still_open if (len(drafts[row].ids) > depth if depth else queries[row].prefill)]
        if not rows:
            continue

        def check(group: list[int], rows: list[int] = rows, depth: int = depth) -> list[Reply]:
            members, replies = [queries[rows[index]] for index in group], [drafts[rows[index]] for index in group]
            _check(omni, gate, members, replies, depth, settings, use)
            return [draft.reply for draft in replies]

        omni.in_batches([queries[row] for row in rows], settings, check, "re-check", progress)
        still_open = [row for row in still_open if not drafts[row].final]


def _check(
    omni: Omni,
    gate: SafetyGate,
    queries: list[Query],
    drafts: list[Draft],
    depth: int,
    settings: GenerationSettings,
    use: GateUse,
) -> None:
    """Decide on one batch of replies, `depth` tokens in, and rewrite those that are flagged."""
    began = time.perf_counter()
    prefills = prefill_ids(omni, queries)
    openings = [
        [*draft.before, *prefill] if use.order == "gate_first" else [*prefill, *draft.before]
        for draft, prefill in zip(drafts, prefills, strict=True)
    ]
    so_far = at_header(omni, [[*opening, *draft.ids[:depth]] for opening, draft in zip(openings, drafts, strict=True)])
    batch = _at_last_header(omni.encode(queries, so_far, prefill=False), len(_header_ids(omni)))
    prompt, classes = decided(omni, gate, queries, batch, batch.gate_position, settings, use, use_cache=True)
    flagged = [row for row, index in enumerate(classes) if index == UNSAFE]
    refusals = dict.fromkeys(flagged, (use.refusal or "", list[int]()))
    if flagged and use.refusal is None:
        kwargs = settings.kwargs() | {"max_new_tokens": settings.max_new_tokens - depth}
        kwargs |= {"logits_processor": finite_logits([queries[row] for row in flagged])}
        unsafe = [[int(gate.token_ids[UNSAFE])]] * len(flagged)
        new = continue_from(omni, batch, prompt.cache, unsafe, flagged, kwargs)
        written = [omni.until_end(ids) for ids in new.tolist()]
        refusals = {row: (omni.decode(ids), ids) for row, ids in zip(flagged, written, strict=True)}
    reading = prompt.reading
    v_s, pair, raw_pair = reading.v_s.tolist(), reading.pair.tolist(), reading.raw_pair.tolist()
    for row, (text, ids) in refusals.items():
        draft = drafts[row]
        kept = draft.ids[:depth]
        draft.ids, draft.final = [*kept, *ids], True
        update = {
            "text": f"{omni.decode(kept)} {text}".strip(),
            "tokens": len(draft.ids),
            "safety_token": "unsafe",
            "v_s": v_s[row],
            "logit_safe": pair[row][SAFE],
            "logit_unsafe": pair[row][UNSAFE],
            "raw_logit_safe": raw_pair[row][SAFE],
            "raw_logit_unsafe": raw_pair[row][UNSAFE],
        }
        draft.reply = draft.reply.model_copy(update=update)
    seconds = (time.perf_counter() - began) / len(drafts)
    for draft in drafts:
        draft.reply = draft.reply.model_copy(update={"seconds": draft.reply.seconds + seconds})


def at_header(omni: Omni, replies: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ids of each reply so far with the assistant's header behind it.

    Placeholders and marks of media that the model wrote stand for no picture or clip, and are left out.
    """
    header = _header_ids(omni)
    marks = [mark for medium in omni.processor.marks.values() for mark in (medium.begin, medium.end)]
    media = omni.media_ids | set(omni.tokenizer.convert_tokens_to_ids(marks))
    return [[*(token for token in ids if token not in media), *header] for ids in replies]


def _header_ids(omni: Omni) -> list[int]:
    """Token ids of the assistant's header."""
    batch = omni.encode([Query.from_text(".")])
    is_header = batch.prompt_mask[0] & ~batch.modality["text"][0]
    ids: list[int] = batch.inputs["input_ids"][0][is_header].tolist()
    return ids


def _at_last_header(batch: OmniBatch, length: int) -> OmniBatch:
    """`batch`, whose rows end in a header of `length` tokens, as prompts with that header in the place of the first.

    What safety attention may read is then the user's turns and the header that is decided at, as at a first decision;
    the reply so far is seen through the header's states.
    """
    width = batch.prompt_mask.shape[1]
    columns = torch.arange(width, device=batch.prompt_mask.device)
    user = torch.stack(list(batch.modality.values())).any(dim=0)
    last = torch.full_like(batch.gate_position, width - 1)
    mask = user | (columns >= width - length)[None]
    return replace(batch, prompt_mask=mask, gate_position=last, last_position=last, labels=None)
