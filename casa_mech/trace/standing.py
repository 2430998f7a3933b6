"""Edits that stand while a block runs, so that generation, the gate and any trace in it see a model changed there.

One forward with edits is `casa_mech.trace.patch`'s; decoding takes many forwards that nobody traces, so these are hooks
on the modules. A trace within the block sees their effect everywhere, with one exception: read at the very output that
is edited, it gets what went into the edit, since nnsight reads inside a module's forward and hooks run after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from casa_mech.omni import Omni
from casa_mech.trace.sites import Edit, Site, check_edited, site_module


@contextmanager
def standing_edits(omni: Omni, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Let what the sites hold go through `edits` in every forward of the block.

    Args:
        omni: the model. LoRA must not be put in or taken out within the block.
        edits: by site, each takes and returns [batch, position, size] (heads side by side); when decoding with a cache,
            position is the new token's.

    Raises:
        InputError: a site that the model does not have, or an encoder's.
    """
    with ExitStack() as stack:
        for site in check_edited(edits, omni.n_layers):
            envoy, side = site_module(omni, site)
            stack.enter_context((_before if side == "input" else _after)(envoy._module, edits[site]))
        yield


@contextmanager
def _before(module: nn.Module, edit: Edit) -> Iterator[None]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, edit: Edit) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, args, output: edit(output), prepend=True)
    try:
        yield
    finally:
        handle.remove()
