"""Prompts that begin alike are read once: one batch's cache, from which other prompts with the same media go on.

A fork keeps the cached keys and values of the tokens that its prompt shares with the one that was read, hides the rest
from attention, and has only its own remaining tokens to read. Pictures and clips are encoded once, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query

Start = Mapping[str, Any]
"""What `model.generate` and `first_steps` begin from: `input_ids` and `attention_mask` [row, position] and either the
media's features or `past_key_values`, a cache that lacks the last tokens."""


@dataclass(frozen=True)
class ReadPrompts:
    """A batch of prompts with its cache and the M-RoPE offsets [row, 1] of text that follows."""

    batch: OmniBatch
    cache: Any
    offsets: Tensor


def read_prompts(omni: Omni, batch: OmniBatch) -> ReadPrompts:
    """One forward over the prompts of `batch`, without the head."""
    batch = batch.to(omni.device)
    with torch.no_grad():
        cache = omni.model.model(**batch.inputs, use_cache=True).past_key_values
    return ReadPrompts(batch, cache, omni.model.model.rope_deltas)


def resumed(omni: Omni, read: ReadPrompts) -> Start:
    """Go on from the prompts as they were read, whose cache is used up; only their last tokens are read again."""
    read.cache.crop(-1)  # the logits that follow a prompt come from reading its last token
    omni.model.model.rope_deltas = read.offsets
    inputs = read.batch.inputs
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "past_key_values": read.cache,
    }


def forked(omni: Omni, read: ReadPrompts, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Start | None:
    """Go on to other prompts that begin as `rows` of those read do, whose cache stays as it is.

    Args:
        omni: the model.
        read: what was read.
        rows: for each prompt the row that it begins like; a row may be used often.
        prompts: ids of each prompt (see `Omni.prompt_ids`).

    Returns:
        None where a prompt's media are not all within what it shares with its row: it has to be read from the start.
    """
    inputs = read.batch.inputs
    chosen = torch.tensor(list(rows), device=omni.device)
    ids, mask = inputs["input_ids"][chosen], inputs["attention_mask"][chosen].clone()
    width = ids.shape[1]
    media = {omni.processor.image_token_id, omni.processor.audio_token_id}
    rests: list[list[int]] = []
    for row, prompt in enumerate(prompts):
        start = width - int(mask[row].sum())
        shared = min(_shared(ids[row, start:].tolist(), prompt), len(prompt) - 1)
        mask[row, start + shared :] = 0
        rests.append(list(prompt[shared:]))
    if any(media & set(rest) for rest in rests):
        return None
    longest = max(len(rest) for rest in rests)
    added = ids.new_full((len(rests), longest), omni.model.generation_config.pad_token_id)
    real = mask.new_zeros(added.shape)
    for row, rest in enumerate(rests):
        added[row, longest - len(rest) :] = torch.tensor(rest, device=omni.device)
        real[row, longest - len(rest) :] = 1
    omni.model.model.rope_deltas = read.offsets[chosen]
    return {
        "input_ids": torch.cat([ids, added], dim=1),
        "attention_mask": torch.cat([mask, real], dim=1),
        "past_key_values": _selected(read.cache, chosen),
    }


def beside(omni: Omni, read: ReadPrompts, queries: Sequence[Query], rows: Sequence[int] | None = None) -> Start:
    """Begin other prompts about the same media, one for each row that was read, or only those of `rows`.

    They are forked where that is possible, and else encoded and read from their start.
    """
    chosen = list(range(len(queries))) if rows is None else list(rows)
    prompts = omni.prompt_ids(read.batch, queries)
    start = forked(omni, read, chosen, [prompts[row] for row in chosen])
    return omni.encode([queries[row] for row in chosen]).inputs if start is None else start


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two prompts have in common at their beginnings."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of `rows`; the layers' tensors are indexed anew, so the one that is given is not touched."""
    chosen = copy(cache)
    chosen.layers = [copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
