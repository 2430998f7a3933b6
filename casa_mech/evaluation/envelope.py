"""How far a gate's numbers depend on which queries share a forward with which: nothing in float32, a little in halves.

A matrix product sums in an order that depends on its shape. In float32 that moves v_s in the sixth digit, in bfloat16
by as much as is measured here, and a decision near its threshold may change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings
from casa_mech.queries import Query, Reply

BATCHES = (4, 16)
"""Sizes of the batches that are held against queries by themselves."""


class BatchEnvelope(BaseModel):
    """Largest changes against each query by itself, over batches by length and at random."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    """Of the model."""
    n: int
    """Number of queries."""
    v_s: float
    """Largest change of v_s."""
    log_odds: float
    """Largest change of the safety token's log-odds, unsafe minus safe."""
    decisions: int
    """Number of queries whose decision changed in some batch."""


def batch_envelope(casa: Casa, queries: Sequence[Query], batches: Sequence[int] = BATCHES) -> BatchEnvelope:
    """The envelope of a gate on `queries`, which should be of several lengths and surfaces.

    Raises:
        InputError: no queries, or a gate without safety attention.
    """
    _ = casa.attention  # a neutral gate has no v_s of its own
    if not queries:
        raise InputError("the envelope of batches needs at least one query")
    alone = casa.decide(queries, GenerationSettings(batch_size=1))
    rng = np.random.default_rng(0)
    v_s, odds, changed = 0.0, 0.0, set[int]()
    for size in batches:
        by_length = casa.decide(queries, GenerationSettings(batch_size=size))
        shuffled: dict[int, Reply] = {}
        order = rng.permutation(len(queries)).tolist()
        for start in range(0, len(order), size):
            places = order[start : start + size]
            replies = casa.decide([queries[place] for place in places], GenerationSettings(batch_size=size))
            shuffled |= zip(places, replies, strict=True)
        for place, reply in enumerate(alone):
            for other in (by_length[place], shuffled[place]):
                v_s = max(v_s, abs(_number(other.v_s) - _number(reply.v_s)))
                odds = max(odds, abs(_odds(other) - _odds(reply)))
                if other.safety_token != reply.safety_token:
                    changed.add(place)
    dtype = str(casa.omni.dtype).removeprefix("torch.")
    return BatchEnvelope(dtype=dtype, n=len(queries), v_s=v_s, log_odds=odds, decisions=len(changed))


def _odds(reply: Reply) -> float:
    return _number(reply.logit_unsafe) - _number(reply.logit_safe)


def _number(value: float | None) -> float:
    assert value is not None
    return value
