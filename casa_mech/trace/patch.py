"""Activation patching: a prompt's forward in which what chosen sites hold goes through an edit.

What is exchanged with what, and what the effect means, belongs to `probes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nnsight
import torch
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.omni import Omni, OmniBatch
from casa_mech.trace.gate import GateReading, SafetyGateLike, precise_pair
from casa_mech.trace.sites import Edit, Site, check_edited, check_sites, site_module


@dataclass(frozen=True)
class EditedPrompt:
    """A prompt's forward with edits in it."""

    logits: Tensor
    """[batch, vocab] at the position that was asked for, rewritten by the gate where there is one."""
    reading: GateReading | None
    """The gate's; None without a gate."""


def edited_prompt(
    omni: Omni,
    batch: OmniBatch,
    position: LongTensor,
    edits: Mapping[Site, Edit],
    gate: SafetyGateLike | None = None,
    hidden: BoolTensor | None = None,
    embeddings: Tensor | None = None,
    gradient: bool = False,
    cut: BoolTensor | None = None,
) -> EditedPrompt:
    """One forward over `batch` with `edits` put in, and the gate, if given, acting on the logits at `position` [batch].

    Args:
        omni: the model.
        batch: the prompts.
        position: [batch], where the logits are read.
        edits: by site; an edit that returns what it is given changes nothing.
        gate: it reads the edited states.
        hidden: [batch, position], positions that no other position attends to and the gate does not read; all others
            keep their place in the rotary embedding. `position` itself must not be hidden.
        embeddings: [batch, position, d_model], the merged embeddings (site `"embeddings"`) if they are known: the
            encoders, most of the work where there are media, are then left out.
        gradient: keep the autograd graph, so that what an edit brings in can be differentiated by.
        cut: [batch, position, position], edges of attention, reader by read, that no head of any block has. A position
            always reads itself.

    Raises:
        InputError: a site that the model does not have, an encoder's, or a prompt with nothing for the gate to read.
    """
    check_edited(edits, omni.n_layers)
    if embeddings is not None:
        # Grids and masks, which place what the encoders give, stay.
        features = omni.architecture.features
        batch = replace(batch, inputs={name: value for name, value in batch.inputs.items() if name not in features})
        edits = {**edits, "embeddings": _replaced_by(embeddings.to(omni.device), edits.get("embeddings"))}
    sites: set[Site] = {"norm", *edits, *([gate.layer] if gate else [])}
    order = [(site, *site_module(omni, site), edits.get(site)) for site in check_sites(sites, omni.n_layers)]
    batch, position = batch.to(omni.device), position.to(omni.device)
    mask = gate.mask(batch) if gate else None
    seen = None
    if hidden is not None:
        hidden = hidden.to(omni.device)
        seen = batch.inputs["attention_mask"].masked_fill(hidden, 0)
        mask = None if mask is None else mask & ~hidden
    if cut is not None:
        present = batch.inputs["attention_mask"] if seen is None else seen
        seen = _edge_mask(present.bool(), cut.to(omni.device), omni.dtype)
    with torch.set_grad_enabled(gradient):
        return EditedPrompt(*_edited_prompt(omni, batch, position, order, gate, mask, seen))


def _edge_mask(present: BoolTensor, cut: BoolTensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, [batch, 1, reader, read]: 0 where a position reads one at or before it that is
    `present` [batch, position] and not `cut` off, else the least number there is."""
    before = torch.ones_like(cut[0]).tril()
    reads = (before & present[:, None] & ~cut) | torch.eye(len(before), dtype=torch.bool, device=cut.device)
    added = torch.zeros(reads.shape, dtype=dtype, device=cut.device)
    return added.masked_fill(~reads, torch.finfo(dtype).min)[:, None]


def _replaced_by(embeddings: Tensor, edit: Edit | None) -> Edit:
    """An edit that puts `embeddings` in place of what a site holds, and then makes `edit`."""
    return lambda _: edit(embeddings) if edit else embeddings


def _edited_prompt(
    omni: Omni,
    batch: OmniBatch,
    position: LongTensor,
    order: Sequence[tuple[Site, Any, str, Edit | None]],
    gate: SafetyGateLike | None,
    mask: BoolTensor | None,
    seen: Tensor | None,
) -> tuple[Tensor, GateReading | None]:
    model, text_model, head = omni.nnsight, omni.envoy("text_model"), omni.envoy("head")
    rows = torch.arange(batch.size, device=omni.device)
    with model.trace(**batch.inputs, use_cache=False):
        if seen is not None:
            # Here, behind the backbone, which counts positions by the mask that it is given.
            positional, named = text_model.inputs
            text_model.inputs = (positional, {**named, "attention_mask": seen})
        states_at = {}
        for site, module, side, edit in order:
            value = module.input if side == "input" else module.output
            if edit is not None:
                value = edit(value)
                if side == "input":
                    module.input = value
                else:
                    module.output = value
            states_at[site] = value
        last = states_at["norm"][rows, position]
        head.input = last.unsqueeze(1)
        logits = head.output[:, 0]
        reading = None
        if gate is not None:
            logits, reading = gate(states_at[gate.layer], mask, precise_pair(omni, gate, logits, last))
        logits = nnsight.save(logits)
        reading = nnsight.save(reading)
    return logits, reading
