from .depth import depth_changes, depth_effects
from .divergence import forced_divergence
from .edges import edge_effects, state_effects
from .replies import PrefilledReply, judge_replies, replies_by_length, trajectories
from .sweep import AttackedModel, PositionAxes, PrefillSweep, compliance_ids, position_axes, prefill_sweep

__all__ = [
    "AttackedModel",
    "PositionAxes",
    "PrefillSweep",
    "PrefilledReply",
    "compliance_ids",
    "depth_changes",
    "depth_effects",
    "edge_effects",
    "forced_divergence",
    "judge_replies",
    "position_axes",
    "prefill_sweep",
    "replies_by_length",
    "state_effects",
    "trajectories",
]
