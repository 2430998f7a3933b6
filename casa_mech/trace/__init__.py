"""Every nnsight trace of the project: capture, edits, the gated forwards. Trace blocks are re-read from source by
nnsight, so they live in these importable modules and nowhere else."""

from casa_mech.trace.capture import Positions, capture
from casa_mech.trace.gate import GatedPrompt, GatedTargets, GateReading, gated_prompt, gated_targets
from casa_mech.trace.layers import layer_states
from casa_mech.trace.sites import Site
from casa_mech.trace.targets import Targets, plain_targets

__all__ = [
    "GateReading",
    "GatedPrompt",
    "GatedTargets",
    "Positions",
    "Site",
    "Targets",
    "capture",
    "gated_prompt",
    "gated_targets",
    "layer_states",
    "plain_targets",
]
