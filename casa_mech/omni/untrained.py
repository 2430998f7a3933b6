"""The control that a probe's finding is held against: the same architecture with weights that nobody trained."""

from __future__ import annotations

import torch

from casa_mech.omni.model import Omni


def untrained(omni: Omni, seed: int = 0) -> Omni:
    """A model of the architecture and processor of `omni`, its weights drawn with `seed` as the library draws them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(omni.model)(omni.model.config)
    return Omni(model.to(omni.device, omni.dtype), omni.processor, f"{omni.source}, untrained")
