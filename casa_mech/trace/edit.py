"""Change the hidden states at one site and see what the model makes of it."""

from __future__ import annotations

from collections.abc import Callable

import nnsight
import torch
from torch import Tensor

from casa_mech.omni import Omni, OmniBatch
from casa_mech.trace.sites import Site, check_sites, site_module


def edited_logits(omni: Omni, batch: OmniBatch, site: Site, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits [batch, position, vocab] of a forward in which the states at `site` went through `edit`.

    `edit` takes and returns [batch, position, d_model]; the identity changes nothing.

    Raises:
        InputError: a site that the model does not have.
    """
    check_sites([site], omni.n_layers)
    batch = batch.to(omni.device)
    with torch.no_grad():
        return _edited_logits(omni, batch, site, edit)


def _edited_logits(omni: Omni, batch: OmniBatch, site: Site, edit: Callable[[Tensor], Tensor]) -> Tensor:
    module, side = site_module(omni, site)
    model, head = omni.nnsight, omni.envoy("head")
    with model.trace(**batch.inputs, use_cache=False):
        if side == "input":
            module.input = edit(module.input)
        else:
            module.output = edit(module.output)
        logits = nnsight.save(head.output)
    return logits  # noqa: RET504  (bound in the trace)
