"""How many threads a model is worth."""

from __future__ import annotations

import os

import torch

from casa_mech.omni import Omni

SMALL = 1024
"""Width below which one matrix product is too short to share between threads."""


def settle_threads(omni: Omni) -> Omni:
    """Run a small model on the CPU in one thread, unless OMP_NUM_THREADS says otherwise; gives the model back.

    An organism's matrix products take microseconds. Sharing them gains nothing on an idle machine, and on a busy one
    the threads wait for each other: a training step then takes ten times as long.
    """
    if omni.device.type == "cpu" and omni.d_model < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return omni
