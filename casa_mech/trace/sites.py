"""Names of the places in the model that can be read, and how each is reached through nnsight.

nnsight wants reads in the order in which the modules run, so a list of sites is always walked in `all_sites`' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor

from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.omni.architecture import part_at

Site = int | str
"""A place in the model:

* `"embeddings"`: the merged text, image and audio embeddings that enter block 0; an int: that block's output (the
  residual stream after it); `"pre.3"`: the residual stream before block 3; `"norm"`: the residual stream after the
  final RMSNorm, which the head reads. All [batch, position, d_model].
* `"attention.3"`, `"mlp.3"`: what attention and MLP of block 3 add to the residual stream.
* `"z.3"`: the outputs of block 3's heads, before the output projection mixes them: [batch, position, head, d_head].
* `"audio"`, `"vision"`: the encoders' outputs, projected to d_model, at the positions that they fill; zeros elsewhere.
"""

Edit = Callable[[Tensor], Tensor]
"""Takes and returns what a site holds, [batch, position, size]; heads (`z`) lie side by side there, head · d_head."""

ENCODERS = {"audio": "audio", "vision": "image"}
"""The encoder sites, in the order in which the encoders run, and the modality whose positions each fills."""
IN_BLOCK = ("pre", "z", "attention", "mlp")


def all_sites(n_layers: int) -> list[Site]:
    """Every site of a model of `n_layers` blocks, in the order in which the model runs them."""
    blocks: list[Site] = []
    for layer in range(n_layers):
        blocks += [*(f"{part}.{layer}" for part in IN_BLOCK), layer]
    return [*ENCODERS, "embeddings", *blocks, "norm"]


def check_sites(sites: Iterable[Site], n_layers: int) -> list[Site]:
    """`sites` without doubles, in the order in which the model runs them.

    Raises:
        InputError: a site that the model does not have; the message lists those that it has.
    """
    distinct, order = set(sites), all_sites(n_layers)
    unknown = [site for site in distinct if site not in order]
    if unknown:
        last = n_layers - 1
        parts = ", ".join(f"{part}.0..{part}.{last}" for part in IN_BLOCK)
        raise InputError(
            f"no site {unknown[0]!r} in a model of {n_layers} blocks; there are {', '.join(ENCODERS)}, embeddings, "
            f"0..{last}, {parts}, norm"
        )
    return [site for site in order if site in distinct]


def check_edited(sites: Iterable[Site], n_layers: int) -> list[Site]:
    """As `check_sites`, for sites that are to be changed.

    Raises:
        InputError: also for an encoder's site.
    """
    order = check_sites(sites, n_layers)
    if set(order) & set(ENCODERS):
        raise InputError("an encoder's output is packed, not by position: edit 'embeddings', where it enters")
    return order


def site_module(omni: Omni, site: Site) -> tuple[Any, Literal["input", "output"]]:
    """The nnsight envoy at which `site` is read and written, and which side of it.

    Heads are one flat tensor there: [batch, position, head * d_head]. An encoder gives a record, packed over the batch.
    """
    names = omni.architecture
    if site in ENCODERS:
        return part_at(omni.nnsight, names.towers[ENCODERS[str(site)]].path), "output"
    blocks = omni.envoy("blocks")
    if site == "embeddings":
        return blocks[0], "input"
    if site == "norm":
        return omni.envoy("norm"), "output"
    if isinstance(site, int):
        return blocks[site], "output"
    part, _, layer = site.partition(".")
    block = blocks[int(layer)]
    if part == "pre":
        return block, "input"
    if part == "z":
        return part_at(part_at(block, names.attention), names.attention_output), "input"
    return part_at(block, names.mlp_added if part == "mlp" else names.attention_added), "output"


def remirror(omni: Omni) -> None:
    """Bring nnsight's tree in step with `omni.model` after modules were put in or taken out (LoRA)."""
    # Wrapping the model afresh would leave the old tree's hooks on every module.
    if "nnsight" in vars(omni):
        omni.nnsight._update(omni.model)
