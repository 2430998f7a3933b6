"""Hidden states of chosen sites and positions, in one forward; positions are cut inside the trace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import nnsight
import torch
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.omni.batch import run_lengths
from casa_mech.trace.sites import ENCODERS, Site, check_sites, site_module

Positions = str
"""A name for the positions that are read:

* `"last"`: the gate's position, the assistant header's last token; `"last:user"`: the last token of the user's turn,
  before the template's;
* `"mean"`: mean over the prompt positions (content of user turns and the header); `"mean:text"`, `"mean:image"`,
  `"mean:audio"`: mean over that modality's positions of the user's turns;
* `"prompt"`: each of the positions that `"mean"` is over;
* `"all"`: every position of the prompt, template included; `"every:4"`: every fourth of them, from the first;
* `"prefill"`: each token of the attacker's opening; `"generated:7"`: tokens 0 to 7 of the reply. The state at a token
  is the one that has read it and predicts the next.
"""

_KNOWN = "last, last:user, mean, mean:text, mean:image, mean:audio, prompt, all, every:<n>, prefill, generated:<k>"


@dataclass(frozen=True)
class Cut:
    """Positions picked from a batch: `pick` vectors, one for each (query, position) or, for a mean, one a query."""

    positions: Positions
    """Their name."""
    row: LongTensor
    """[pick]: the query."""
    column: LongTensor
    """[pick]: the position in the padded batch; -1 for a mean."""
    at: LongTensor
    """[pick]: the token's number in the prompt, or in the prefill or reply; -1 for a mean."""
    mask: BoolTensor | None = None
    """[pick, position]: the positions that a mean is taken over; None for single positions."""


def check_positions(positions: Positions) -> Positions:
    """`positions`, if it is the name of some.

    Raises:
        InputError: it is not; the message lists those that are.
    """
    if not re.fullmatch(
        r"last(:user)?|mean(:(text|image|audio))?|prompt|all|every:[1-9]\d*|prefill|generated:\d+", positions
    ):
        raise InputError(f"no positions {positions!r}; use {_KNOWN}")
    return positions


def one_a_query(positions: Positions) -> bool:
    """True where `positions` are at most one vector for each query: a single position or a mean."""
    return positions.partition(":")[0] in ("last", "mean")


def make_cut(batch: OmniBatch, positions: Positions) -> Cut:
    """The cut of `batch` at `positions`; queries that have no such position are left out.

    Raises:
        InputError: a choice of positions that does not exist.
    """
    kind, _, detail = check_positions(positions).partition(":")
    if kind == "mean":
        mask = batch.modality[detail] if detail else batch.prompt_mask
        row = mask.any(dim=1).nonzero()[:, 0]
        none = torch.full_like(row, -1)
        return Cut(positions, row, none, none, mask[row])
    column = torch.arange(batch.prompt_mask.shape[1], device=row_device(batch))[None]
    start = (batch.inputs["attention_mask"] == 0).sum(dim=1, keepdim=True)
    if kind == "prompt":
        row, at = batch.prompt_mask.nonzero().unbind(dim=1)
        return Cut(positions, row, at, at - start[row, 0])
    gate, end = batch.gate_position[:, None], batch.last_position[:, None]
    number = int(detail) if detail.isdigit() else 0
    user = torch.stack(list(batch.modality.values())).any(dim=0)
    chosen = torch.where(user, column, -1).amax(dim=1, keepdim=True) if detail == "user" else gate
    first, last = {
        "last": (chosen, chosen),
        "all": (start, gate),
        "every": (start, gate),
        "prefill": (gate + 1, end),
        "generated": (end + 1, end + 1 + number),
    }[kind]
    step = number if kind == "every" else 1
    row, column = ((column >= first) & (column <= last) & ((column - first) % step == 0)).nonzero().unbind(dim=1)
    origin = start if kind == "last" else first
    return Cut(positions, row, column, column - origin[row, 0])


def row_device(batch: OmniBatch) -> torch.device:
    """Where the batch's tensors are."""
    return batch.gate_position.device


def capture_cuts(omni: Omni, batch: OmniBatch, sites: Sequence[Site], cuts: Sequence[Cut]) -> dict[Site, list[Tensor]]:
    """Hidden states at `sites` and `cuts`, from one forward that stops after the last of the sites.

    Args:
        omni: the model; whatever is attached to it (LoRA) takes part.
        batch: the queries, on the model's device.
        sites: where to read.
        cuts: which positions, made from this batch.

    Returns:
        For each site, in the order in which the model runs them, a tensor for each cut, on the model's device and in
        its dtype: [pick, d_model], heads [pick, head, d_head]. A mean at an encoder's site is over that encoder's
        positions only; where a vector has none of them it is zero.

    Raises:
        InputError: a site that the model does not have; the message lists those that it has.
    """
    order = check_sites(sites, omni.n_layers)
    if not order:
        return {}
    with torch.no_grad():
        states_of = _trace(omni, batch, order, cuts)
    for site, states in states_of.items():
        if str(site).startswith("z."):
            states_of[site] = [state.unflatten(-1, (omni.n_heads, -1)) for state in states]
    return states_of


def _trace(omni: Omni, batch: OmniBatch, order: list[Site], cuts: Sequence[Cut]) -> dict[Site, list[Tensor]]:
    active = [site for site in order if site not in ENCODERS or _encodes(omni, batch, site)]
    places = [(site, *site_module(omni, site)) for site in active]
    with omni.nnsight.trace(**batch.inputs, use_cache=False) as tracer:
        states_of = nnsight.save({})
        for site, module, side in places:
            hidden, valid = (module.input if side == "input" else module.output), None
            if site in ENCODERS:
                hidden, valid = _placed(omni, batch, site, hidden)
            states_of[site] = [cut_states(hidden, cut, valid) for cut in cuts]
        tracer.stop()
    width = omni.d_model
    for site in order:
        if site not in states_of:  # an encoder without a picture or clip in the batch
            like = omni.embedding.weight
            states_of[site] = [like.new_zeros(len(cut.row), width) for cut in cuts]
    return {site: states_of[site] for site in order}


def _encodes(omni: Omni, batch: OmniBatch, site: Site) -> bool:
    """True if the encoder `site` runs on this batch."""
    return omni.architecture.towers[ENCODERS[str(site)]].features in batch.inputs


def _placed(omni: Omni, batch: OmniBatch, site: Site, output: object) -> tuple[Tensor, BoolTensor]:
    """An encoder's output at the positions it fills [batch, position, d_model], and a mask of these."""
    modality = ENCODERS[str(site)]
    valid, tower = batch.modality[modality], omni.architecture.towers[modality]
    packed: Tensor = getattr(output, tower.output) if tower.output else output
    if not tower.packed:
        counts = torch.tensor([count for row in valid.tolist() for count in run_lengths(row, True)])
        packed = packed[torch.arange(packed.shape[1]) < counts[:, None]]
    hidden = packed.new_zeros(*valid.shape, packed.shape[-1])
    hidden[valid] = packed
    return hidden, valid


def cut_states(hidden: Tensor, cut: Cut, valid: BoolTensor | None = None) -> Tensor:
    """`hidden` [batch, position, width] at `cut`: [pick, width]. A mean counts those in `valid` [batch, position]."""
    if cut.mask is None:
        return hidden[cut.row, cut.column]
    weight = cut.mask if valid is None else cut.mask & valid[cut.row]
    return _mean(hidden if len(cut.row) == len(hidden) else hidden[cut.row], weight)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(torch.float32)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weight.unsqueeze(1), hidden.to(torch.float32)).squeeze(1).to(hidden.dtype)


def capture(omni: Omni, batch: OmniBatch, sites: Sequence[Site], positions: Positions = "last") -> dict[Site, Tensor]:
    """Hidden states at `sites`, one vector a query or every padded position, from one forward that stops early.

    Returns:
        For each site a tensor on the model's device and in its dtype: for `"all"` [batch, position, d_model] with
        padding, else [batch, d_model]; zeros for a query that has no such positions. Heads have two axes for d_model.

    Raises:
        InputError: a site or a choice of positions that does not exist, or more than one position a query.
    """
    batch = batch.to(omni.device)
    if positions == "all":
        every = torch.ones_like(batch.prompt_mask).nonzero()
        cut = Cut("all", every[:, 0], every[:, 1], every[:, 1])
        states_of = capture_cuts(omni, batch, sites, [cut])
        return {site: states[0].unflatten(0, batch.prompt_mask.shape) for site, states in states_of.items()}
    cut = make_cut(batch, positions)
    if not one_a_query(positions):
        raise InputError(f"positions {positions!r} are several a query; capture_cuts gives them")
    return {
        site: states[0].new_zeros(batch.size, *states[0].shape[1:]).index_copy(0, cut.row, states[0])
        for site, states in capture_cuts(omni, batch, sites, [cut]).items()
    }
