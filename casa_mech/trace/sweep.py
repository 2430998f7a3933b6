"""Many positions of one forward: states and logits of a model after k tokens of a continuation, for all k at once.

Attention is causal, so position k of the longest continuation is the last position of its first k tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import LongTensor, Tensor

from casa_mech.omni import Omni, OmniBatch
from casa_mech.trace.sites import Site, check_sites, site_module


@dataclass(frozen=True)
class Sweep:
    """States and logits at chosen positions of one forward."""

    states: dict[Site, Tensor]
    """For each site [batch, step, d_model]."""
    logits: Tensor
    """[batch, step, vocab]."""
    whole: Tensor | None
    """[batch, position, d_model]: every position's states at one site, if one was asked for whole."""
    final: Tensor
    """[batch, step, d_model]: the final states, which the head read."""


def read_positions(
    omni: Omni, batch: OmniBatch, positions: LongTensor, sites: Sequence[Site], whole: Site | None = None
) -> Sweep:
    """Hidden states at `sites` and logits at `positions` [batch, step], from one forward.

    Raises:
        InputError: a site that the model does not have.
    """
    to_read: set[Site] = {*sites, "norm", *([] if whole is None else [whole])}
    order = [(site, *site_module(omni, site)) for site in check_sites(to_read, omni.n_layers)]
    batch, positions = batch.to(omni.device), positions.to(omni.device)
    with torch.no_grad():
        states, logits, every = _read_positions(omni, batch, positions, order, whole)
    chosen = {site: states[site] for site in check_sites(sites, omni.n_layers)}
    return Sweep(chosen, logits, every, states["norm"])


def _read_positions(
    omni: Omni, batch: OmniBatch, positions: LongTensor, order: Sequence[tuple[Site, Any, str]], whole: Site | None
) -> tuple[dict[Site, Tensor], Tensor, Tensor | None]:
    model, head = omni.nnsight, omni.envoy("head")
    rows = torch.arange(batch.size, device=omni.device).unsqueeze(1)
    with model.trace(**batch.inputs, use_cache=False):
        states = nnsight.save({})
        every = None
        for site, module, side in order:
            hidden = module.input if side == "input" else module.output
            if site == whole:
                every = hidden.clone()
            states[site] = hidden[rows, positions]
        head.input = states["norm"]
        logits = nnsight.save(head.output)
        every = nnsight.save(every)
    return states, logits, every
