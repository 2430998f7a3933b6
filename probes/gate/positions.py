"""Roles of a prompt's positions: padding, template, text, picture, clip, header, and the key word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import BoolTensor, LongTensor

from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query

ROLES = ("padding", "other", "text", "image", "audio", "header")
"""`"other"`: system prompt, earlier replies, prefill and control tokens; the rest is what safety attention may read."""
KEY = "key word"


def position_roles(batch: OmniBatch) -> LongTensor:
    """Each position's index in `ROLES`, long [batch, position]."""
    roles = batch.inputs["attention_mask"].long()
    for kind, mask in batch.modality.items():
        roles = roles.masked_fill(mask, ROLES.index(kind))
    user = torch.stack(list(batch.modality.values())).any(dim=0)
    return roles.masked_fill(batch.prompt_mask & ~user, ROLES.index("header"))


def key_positions(omni: Omni, batch: OmniBatch, queries: Sequence[Query]) -> BoolTensor:
    """Positions [batch, position] in the user's text at which a query's `meta["topic"]` is written; none without it."""
    is_key = torch.zeros_like(batch.prompt_mask)
    text, ids = batch.modality["text"], batch.inputs["input_ids"]
    for row, query in enumerate(queries):
        word = query.meta.get("topic", "")
        # A word's pieces differ with a blank before it in byte-level tokenizers.
        for written in (word, f" {word}") if word else ():
            pieces = torch.tensor(omni.tokenizer(written, add_special_tokens=False)["input_ids"], device=ids.device)
            for start in range(ids.shape[1] - len(pieces) + 1):
                here = slice(start, start + len(pieces))
                if text[row, here].all() and torch.equal(ids[row, here], pieces):
                    is_key[row, here] = True
    return is_key
