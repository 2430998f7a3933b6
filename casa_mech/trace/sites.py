"""Names of the places in the model that can be read, and how each is reached through nnsight.

nnsight wants reads in the order in which the modules run, so a list of sites is always walked in `SITE_ORDER`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from casa_mech.errors import InputError
from casa_mech.omni import Omni

Site = int | Literal["embeddings", "norm"]
"""`"embeddings"`: the merged text, image and audio embeddings that enter block 0; an int: that block's output (the
residual stream after it); `"norm"`: the residual stream after the final RMSNorm, which the head reads."""


def check_sites(sites: Iterable[Site], n_layers: int) -> list[Site]:
    """`sites` without doubles, in the order in which the model runs them.

    Raises:
        InputError: a site that the model does not have.
    """
    wanted = set(sites)
    order: list[Site] = ["embeddings", *range(n_layers), "norm"]
    unknown = [site for site in wanted if site not in order]
    if unknown:
        raise InputError(
            f"no site {unknown[0]!r} in a model of {n_layers} blocks; use embeddings, 0..{n_layers - 1}, norm"
        )
    return [site for site in order if site in wanted]


def site_module(omni: Omni, site: Site) -> tuple[Any, Literal["input", "output"]]:
    """The nnsight envoy at which `site` is read and written, and which side of it."""
    language_model = omni.nnsight.model.language_model
    if site == "embeddings":
        return language_model.layers[0], "input"
    if site == "norm":
        return language_model.norm, "output"
    return language_model.layers[site], "output"


def remirror(omni: Omni) -> None:
    """Bring nnsight's tree in step with `omni.model` after modules were put in or taken out (LoRA)."""
    # Wrapping the model afresh would leave the old tree's hooks on every module.
    if "nnsight" in vars(omni):
        omni.nnsight._update(omni.model)
