"""What each position of a prompt is, and pairs of prompts whose positions correspond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import BoolTensor, LongTensor

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query

ROLES = ("padding", "other", "text", "image", "audio", "header")
"""`"other"`: system prompt, earlier replies, prefill and control tokens; the rest is what safety attention may read."""
KEY = "key word"
SPANS = (KEY, "image", "audio", "other text", "header", "whole prompt")
"""Spans of a pair: the words in which the two prompts differ, the media, the other words, the assistant's header, and
all of these together."""


@dataclass(frozen=True)
class Pair:
    """Two requests that differ in what is asked for and in nothing else, as far as their maker could see to it."""

    harmful: Query
    benign: Query


def position_roles(batch: OmniBatch) -> LongTensor:
    """For each position [batch, position] its index in `ROLES`."""
    roles = batch.inputs["attention_mask"].long()
    for kind, mask in batch.modality.items():
        roles = roles.masked_fill(mask, ROLES.index(kind))
    user = torch.stack(list(batch.modality.values())).any(dim=0)
    return roles.masked_fill(batch.prompt_mask & ~user, ROLES.index("header"))


def aligned_pairs(omni: Omni, pairs: Sequence[Pair], batch_size: int = 64) -> list[Pair]:
    """Those of `pairs` whose two prompts have the same role at every position, so that states can be exchanged.

    Raises:
        InputError: not one pair has.
    """
    kept = []
    for start in range(0, len(pairs), batch_size):
        group = pairs[start : start + batch_size]
        both = omni.encode([pair.harmful for pair in group] + [pair.benign for pair in group], prefill=False)
        one, other = position_roles(both).chunk(2)
        kept += [pair for pair, same in zip(group, (one == other).all(dim=1).tolist(), strict=True) if same]
    if not kept:
        raise InputError("no pair has two prompts of one layout: give requests that differ in words of equal length")
    return kept


def pair_spans(harmful: OmniBatch, benign: OmniBatch) -> dict[str, BoolTensor]:
    """The `SPANS` [batch, position] of aligned pairs, given as two batches. A span may be empty in some rows."""
    roles = position_roles(harmful)
    text = roles == ROLES.index("text")
    differs = text & (harmful.inputs["input_ids"] != benign.inputs["input_ids"])
    spans = {KEY: differs, "image": roles == ROLES.index("image"), "audio": roles == ROLES.index("audio")}
    spans |= {"other text": text & ~differs, "header": roles == ROLES.index("header")}
    return {**spans, "whole prompt": harmful.prompt_mask}


def key_positions(omni: Omni, batch: OmniBatch, queries: Sequence[Query]) -> BoolTensor:
    """Positions [batch, position] in the user's text at which a query's `meta["topic"]` is written; none without it."""
    found = torch.zeros_like(batch.prompt_mask)
    text, ids = batch.modality["text"], batch.inputs["input_ids"]
    for row, query in enumerate(queries):
        word = query.meta.get("topic", "")
        # A word's pieces differ with a blank before it in byte-level tokenizers.
        for written in (word, f" {word}") if word else ():
            pieces = torch.tensor(omni.tokenizer(written, add_special_tokens=False)["input_ids"], device=ids.device)
            for start in range(ids.shape[1] - len(pieces) + 1):
                here = slice(start, start + len(pieces))
                if text[row, here].all() and torch.equal(ids[row, here], pieces):
                    found[row, here] = True
    return found
