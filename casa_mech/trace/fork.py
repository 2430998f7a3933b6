"""Prompts that begin alike are read once: one batch's cache, from which other prompts with the same media go on.

A fork keeps the cached keys and values of the tokens that its prompt shares with the one that was read, hides the rest
from attention, and has only its own remaining tokens to read. Pictures and clips are encoded once, whatever the prompts
say of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import DynamicCache

from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query

Start = Mapping[str, Any]
"""Inputs that `model.generate` and `first_steps` begin from: `input_ids`, `attention_mask` [row, position] and either
the media's features or `past_key_values`, a cache that lacks the last tokens."""


@dataclass(frozen=True)
class ReadPrompts:
    """A batch of prompts after their forward."""

    batch: OmniBatch
    """The batch whose pictures and clips the prompts are about."""
    input_ids: LongTensor
    """[row, position], as the cache holds them."""
    attention_mask: LongTensor
    """[row, position]."""
    cache: Any
    """Keys and values of the prompts."""
    offsets: Tensor
    """[row, 1]: the M-RoPE offset of text that follows (`Omni.text_offset`)."""


def read_prompts(omni: Omni, batch: OmniBatch, start: Start | None = None) -> ReadPrompts:
    """One forward over the prompts of `batch`, or over what of `start` is not read yet; without the head."""
    start = batch.inputs if start is None else start
    # Made here, so that layers with a sliding window, too, keep all that was read: prompts fork from any of it.
    inputs = {"past_key_values": DynamicCache(), **unread(omni, start)}
    with torch.no_grad():
        cache = omni.backbone(**inputs, use_cache=True).past_key_values
    offsets = omni.text_offset(len(start["input_ids"]))
    return ReadPrompts(batch, start["input_ids"], start["attention_mask"], cache, offsets)


def unread(omni: Omni, start: Start) -> dict[str, Any]:
    """A forward's inputs: of prompts with a cache, only the tokens that are not in it."""
    cache = start.get("past_key_values")
    if cache is None:
        return dict(start)
    new = start["input_ids"].shape[1] - cache.get_seq_length()
    positions = omni.text_positions(start["attention_mask"])[..., -new:]
    return {**start, "input_ids": start["input_ids"][:, -new:], "position_ids": positions}


def resumed(omni: Omni, read: ReadPrompts) -> Start:
    """Go on from the prompts as they were read, whose cache is used up; only their last tokens are read again."""
    read.cache.crop(-1)  # the logits that follow a prompt come from reading its last token
    omni.set_text_offset(read.offsets)
    return {"input_ids": read.input_ids, "attention_mask": read.attention_mask, "past_key_values": read.cache}


def joined(omni: Omni, first: ReadPrompts, second: ReadPrompts) -> ReadPrompts:
    """The rows of both, those of `first` first, padded on the left to one width; with the batch of `first`."""
    width = max(first.input_ids.shape[1], second.input_ids.shape[1])
    pad_id = omni.pad_id

    def both(one: Tensor, other: Tensor, dim: int, value: int = 0) -> Tensor:
        return torch.cat([_padded(one, width, dim, value), _padded(other, width, dim, value)])

    cache = copy(first.cache)
    cache.layers = [copy(layer) for layer in first.cache.layers]
    for layer, other in zip(cache.layers, second.cache.layers, strict=True):
        layer.keys = both(layer.keys, other.keys, -2)
        layer.values = both(layer.values, other.values, -2)
    return ReadPrompts(
        first.batch,
        both(first.input_ids, second.input_ids, -1, pad_id),
        both(first.attention_mask, second.attention_mask, -1),
        cache,
        torch.cat([first.offsets, second.offsets]),
    )


def _padded(tensor: Tensor, width: int, dim: int, value: int) -> Tensor:
    missing = width - tensor.shape[dim]
    # `pad` counts from the last axis, and has its left side first.
    return nn.functional.pad(tensor, [0, 0] * (-dim - 1) + [missing, 0], value=value) if missing else tensor


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
    index = torch.tensor(list(rows), device=omni.device)
    ids, mask = read.input_ids[index], read.attention_mask[index].clone()
    width = ids.shape[1]
    media = omni.media_ids
    rests: list[list[int]] = []
    for row, prompt in enumerate(prompts):
        start = width - int(mask[row].sum())
        shared = min(_shared(ids[row, start:].tolist(), prompt), len(prompt) - 1)
        mask[row, start + shared :] = 0
        rests.append(list(prompt[shared:]))
    if any(media & set(rest) for rest in rests):
        return None
    longest = max(len(rest) for rest in rests)
    added = ids.new_full((len(rests), longest), omni.pad_id)
    real = mask.new_zeros(added.shape)
    for row, rest in enumerate(rests):
        added[row, longest - len(rest) :] = torch.tensor(rest, device=omni.device)
        real[row, longest - len(rest) :] = 1
    omni.set_text_offset(read.offsets[index])
    return {
        "input_ids": torch.cat([ids, added], dim=1),
        "attention_mask": torch.cat([mask, real], dim=1),
        "past_key_values": _selected(read.cache, index),
    }


def beside(omni: Omni, read: ReadPrompts, queries: Sequence[Query], rows: Sequence[int] | None = None) -> Start:
    """Begin other prompts about the same media, one for each row that was read, or only those of `rows`.

    They are forked where that is possible, and else encoded and read from their start.
    """
    rows = list(range(len(queries))) if rows is None else list(rows)
    prompts = omni.prompt_ids(read.batch, queries)
    start = forked(omni, read, rows, [prompts[row] for row in rows])
    return omni.encode([queries[row] for row in rows]).inputs if start is None else start


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids that two prompts have in common at their beginnings."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of `rows`; the layers' tensors are indexed anew, so `cache` itself is not touched."""
    selected = copy(cache)
    selected.layers = [copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected
