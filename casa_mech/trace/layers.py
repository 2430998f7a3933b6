"""The residual stream at every depth, with its autograd graph: what losses on representations need."""

from __future__ import annotations

import nnsight
import torch
from torch import Tensor

from casa_mech.omni import Omni, OmniBatch
from casa_mech.trace.sites import check_sites


def layer_states(omni: Omni, batch: OmniBatch, depth: int) -> Tensor:
    """States after 0, 1, ..., `depth` blocks [depth + 1, batch, position, d_model]; the forward stops there.

    Index 0 are the merged embeddings. Without `torch.no_grad` around it, the result has its graph.

    Raises:
        InputError: the model has fewer blocks.
    """
    check_sites([depth - 1] if depth > 0 else ["embeddings"], omni.n_layers)
    return _layer_states(omni, batch.to(omni.device), depth)


def _layer_states(omni: Omni, batch: OmniBatch, depth: int) -> Tensor:
    blocks = omni.envoy("blocks")
    with omni.nnsight.trace(**batch.inputs, use_cache=False) as tracer:
        states = nnsight.save([])
        states.append(blocks[0].input)
        for index in range(depth):
            states.append(blocks[index].output)
        tracer.stop()
    return torch.stack(states)
