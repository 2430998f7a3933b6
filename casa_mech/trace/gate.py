"""The forwards in which the gate acts: one over a prompt (inference), one teacher-forced (training).

What the gate computes belongs to `casa_mech/casa`; here is only how it is put into the model. The head is given
nothing but the positions that are needed, so its full [batch, position, vocab] output never exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import nnsight
import torch
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.omni import Omni, OmniBatch
from casa_mech.trace.sites import Edit, Site, site_module
from casa_mech.vocabulary import at_least_float32


@dataclass(frozen=True)
class GateReading:
    """The gate's numbers in one forward."""

    v_s: Tensor
    """[batch]: the probability of harm that safety attention reads."""
    pair: Tensor
    """[batch, 2]: the rewritten logits of the safety tokens (safe, unsafe)."""
    raw_pair: Tensor
    """[batch, 2]: the language model's own logits of them."""
    attention: Tensor
    """[batch, position]: the weights of safety attention."""


class SafetyGateLike(Protocol):
    """Reads prompt states, rewrites the two safety logits."""

    layer: Site
    token_ids: LongTensor
    """[2]: ids of the safety tokens (safe, unsafe)."""

    def mask(self, batch: OmniBatch) -> BoolTensor:
        """Positions [batch, position] that may be read."""

    def __call__(self, states: Tensor, mask: BoolTensor, logits: Tensor) -> tuple[Tensor, GateReading]:
        """States [batch, position, d_model], mask [batch, position], logits [batch, vocab] → new logits, reading."""


class TokenRows(Protocol):
    """The safety tokens' trainable rows, which stand in for those of the embedding and of the head."""

    def embed(self, embeddings: Tensor, input_ids: LongTensor) -> Tensor:
        """Embeddings [batch, position, d_model] with the two tokens' rows put in."""

    def score(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Logits [row, vocab] with the two tokens' columns computed from `hidden` [row, d_model]."""


@dataclass(frozen=True)
class ReadEdits:
    """What the gate reads instead of the states themselves, which go on through the model as they are."""

    attended: Edit
    """Of the states [batch, position, d_model] that safety attention reads."""
    decided: Edit
    """Of the final states [batch, d_model] at the gate's position, from which the head makes the pair."""


@dataclass(frozen=True)
class GatedPrompt:
    """A prompt's forward with the gate in it."""

    reading: GateReading
    """The gate's numbers."""
    logits: Tensor
    """[batch, vocab] at the gate's position, rewritten."""
    cache: Any
    """Keys and values of the whole prompt, for decoding on."""


def gated_prompt(
    omni: Omni,
    batch: OmniBatch,
    gate: SafetyGateLike,
    position: LongTensor,
    use_cache: bool = True,
    edits: ReadEdits | None = None,
) -> GatedPrompt:
    """One forward over `batch`'s prompts with the gate acting on the logits at `position` [batch].

    With `edits` the gate reads other states; the cache is the same.

    Raises:
        InputError: a prompt without a position that the gate may read.
    """
    batch, position = batch.to(omni.device), position.to(omni.device)
    mask = gate.mask(batch)
    with torch.no_grad():
        return _gated_prompt(omni, batch, gate, mask, position, use_cache, edits)


def _gated_prompt(
    omni: Omni,
    batch: OmniBatch,
    gate: SafetyGateLike,
    mask: BoolTensor,
    position: LongTensor,
    use_cache: bool,
    edits: ReadEdits | None,
) -> GatedPrompt:
    model, norm, head = omni.nnsight, omni.envoy("norm"), omni.envoy("head")
    site, _ = site_module(omni, gate.layer)
    rows = torch.arange(batch.size, device=omni.device)
    with model.trace(**batch.inputs, use_cache=use_cache):
        states = site.output
        hidden = states if gate.layer == "norm" else norm.output
        last = hidden[rows, position]
        if edits is not None:
            states, last = edits.attended(states), edits.decided(last)
        head.input = last.unsqueeze(1)
        logits, reading = gate(states, mask, precise_pair(omni, gate, head.output[:, 0], last))
        head.output = logits.unsqueeze(1)
        logits = nnsight.save(logits)
        reading = nnsight.save(reading)
        cache = nnsight.save(model.output.past_key_values)
    return GatedPrompt(reading, logits, cache)


@dataclass(frozen=True)
class GatedTargets:
    """A teacher-forced forward with the gate in it; `target` counts the supervised tokens of the batch, row by row."""

    reading: GateReading
    """The gate's numbers."""
    logits: Tensor
    """[target, vocab]: the language model's own, in its dtype."""
    tokens: LongTensor
    """[target]."""
    row: LongTensor
    """[target]: the query that each belongs to."""
    first: LongTensor
    """[batch]: the target that is the query's safety token."""
    gated: Tensor
    """[batch, vocab]: the logits of these, rewritten by the gate; at least float32."""


def gated_targets(omni: Omni, batch: OmniBatch, gate: SafetyGateLike, rows: TokenRows) -> GatedTargets:
    """Teacher-forced forward over `batch`, whose targets begin with the true safety token; keeps the autograd graph.

    The gate acts where the first target is predicted; prompt states reach safety attention detached (docs/method.md
    §1.2). `batch.labels` must be set.
    """
    batch = batch.to(omni.device)
    mask = gate.mask(batch)
    assert batch.labels is not None
    predicted = batch.labels[:, 1:] != -100
    row = predicted.nonzero()[:, 0]
    first = torch.searchsorted(row, torch.arange(batch.size, device=row.device))
    reading, logits, gated = _gated_targets(omni, batch, gate, rows, mask, predicted, first)
    return GatedTargets(reading, logits, batch.labels[:, 1:][predicted], row, first, gated)


def _gated_targets(
    omni: Omni,
    batch: OmniBatch,
    gate: SafetyGateLike,
    rows: TokenRows,
    mask: BoolTensor,
    predicted: Tensor,
    first: LongTensor,
) -> tuple[GateReading, Tensor, Tensor]:
    model, embedding = omni.nnsight, omni.envoy("embedding")
    norm, head = omni.envoy("norm"), omni.envoy("head")
    site, _ = site_module(omni, gate.layer)
    half = omni.head.weight.dtype.itemsize < 4
    with model.trace(**batch.inputs, use_cache=False):
        embedding.output = rows.embed(embedding.output, batch.inputs["input_ids"])
        states = site.output
        hidden = states if gate.layer == "norm" else norm.output
        hidden = hidden[:, :-1][predicted]
        head.input = hidden
        logits = rows.score(head.output, hidden)
        decided = logits[first]
        if half:  # the pair does not survive rounding: steps of 1/16 where logits are about 10
            decided = rows.score(at_least_float32(decided), hidden[first])
        gated, reading = gate(states, mask, decided)
        logits = nnsight.save(logits)
        gated = nnsight.save(gated)
        reading = nnsight.save(reading)
    return reading, logits, gated


def precise_pair(omni: Omni, gate: SafetyGateLike, logits: Tensor, hidden: Tensor) -> Tensor:
    """The head's `logits` [batch, vocab] with the safety tokens' two columns computed in float32.

    They are computed from the states `hidden` [batch, d_model] that the head read. In float32 and wider the logits are
    returned as they are: the head's own product is that precise.
    """
    if logits.dtype.itemsize >= 4:
        return logits
    rows = omni.head.weight[gate.token_ids]
    pair = at_least_float32(hidden) @ at_least_float32(rows).T
    return at_least_float32(logits).index_copy(1, gate.token_ids, pair)
