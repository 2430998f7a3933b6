"""Matched pairs: a harmful request and its benign counterpart whose prompts correspond position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import BoolTensor

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from probes.gate.positions import KEY, ROLES, position_roles

SPANS = (KEY, "image", "audio", "other text", "header", "whole prompt")
"""Spans of a pair: the words in which the two prompts differ, the media, the other words, the assistant's header, and
all of these together."""


@dataclass(frozen=True)
class MatchedPair:
    """Two requests that differ in what is requested and in nothing else, as far as their maker could see to it."""

    harmful: Query
    benign: Query


def aligned_pairs(omni: Omni, pairs: Sequence[MatchedPair], batch_size: int = 64) -> list[MatchedPair]:
    """Those of `pairs` whose two prompts have the same role at every position, so that states can be exchanged.

    Raises:
        InputError: not one pair has.
    """
    aligned = []
    for start in range(0, len(pairs), batch_size):
        group = pairs[start : start + batch_size]
        both = omni.encode([pair.harmful for pair in group] + [pair.benign for pair in group], prefill=False)
        harmful, benign = position_roles(both).chunk(2)
        aligned += [pair for pair, same in zip(group, (harmful == benign).all(dim=1).tolist(), strict=True) if same]
    if not aligned:
        raise InputError("no pair has two prompts of one layout: give requests that differ in words of equal length")
    return aligned


def pair_spans(harmful: OmniBatch, benign: OmniBatch) -> dict[str, BoolTensor]:
    """The `SPANS` [batch, position] of aligned pairs, given as two batches. A span may be empty in some rows."""
    roles = position_roles(harmful)
    text = roles == ROLES.index("text")
    differs = text & (harmful.inputs["input_ids"] != benign.inputs["input_ids"])
    spans = {KEY: differs, "image": roles == ROLES.index("image"), "audio": roles == ROLES.index("audio")}
    spans |= {"other text": text & ~differs, "header": roles == ROLES.index("header")}
    return {**spans, "whole prompt": harmful.prompt_mask}
