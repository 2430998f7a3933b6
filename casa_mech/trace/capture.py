"""Hidden states of chosen sites and positions, in one forward; positions are cut inside the trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import nnsight
import torch
from torch import BoolTensor, Tensor

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.trace.sites import Site, check_sites, site_module

Positions = Literal["all", "last", "mean", "mean:text", "mean:image", "mean:audio"]
"""`"all"`: every position; `"last"`: the gate's position; `"mean"`: mean over the prompt positions; `"mean:text"` and
so on: mean over that modality's positions of the user's turns (zeros for a query that has none)."""


def capture(omni: Omni, batch: OmniBatch, sites: Sequence[Site], positions: Positions = "last") -> dict[Site, Tensor]:
    """Hidden states at `sites`, from one forward that stops after the last of them.

    Returns:
        For each site a tensor on the model's device and in its dtype: [batch, position, d_model] for `"all"`, else
        [batch, d_model].

    Raises:
        InputError: a site or a choice of positions that does not exist.
    """
    order = check_sites(sites, omni.n_layers)
    if not order:
        return {}
    batch = batch.to(omni.device)
    mask = _position_mask(batch, positions)
    with torch.no_grad():
        return _capture(omni, batch, order, mask, mean=positions.startswith("mean"))


def _capture(
    omni: Omni, batch: OmniBatch, order: list[Site], mask: BoolTensor | None, mean: bool
) -> dict[Site, Tensor]:
    places = [(site, *site_module(omni, site)) for site in order]
    with omni.nnsight.trace(**batch.inputs, use_cache=False) as tracer:
        states = nnsight.save({})
        for site, module, side in places:
            hidden = module.input if side == "input" else module.output
            states[site] = select_positions(hidden, mask, mean)
        tracer.stop()
    return states


def select_positions(hidden: Tensor, mask: BoolTensor | None, mean: bool) -> Tensor:
    """`hidden` [batch, position, d_model] at `mask` [batch, position]: the mean or the one position; all if no mask."""
    if mask is None:
        return hidden.clone()
    if not mean:
        return hidden[mask]
    weight = mask.to(torch.float32)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bp,bpd->bd", weight, hidden.to(torch.float32)).to(hidden.dtype)


def _position_mask(batch: OmniBatch, positions: str) -> BoolTensor | None:
    if positions == "all":
        return None
    if positions == "last":
        width = batch.prompt_mask.shape[1]
        return torch.arange(width, device=batch.gate_position.device)[None] == batch.gate_position[:, None]
    if positions == "mean":
        return batch.prompt_mask
    kind = positions.removeprefix("mean:")
    if kind not in batch.modality:
        raise InputError(f"no positions {positions!r}; use all, last, mean, mean:text, mean:image or mean:audio")
    return batch.modality[kind]
