from .depth import depth_effects, depth_shares
from .replies import PrefilledReply, judge_replies, replies_by_length, trajectories
from .sweep import AttackedModel, PrefillSweep, RefusalAxis, compliance_ids, prefill_sweep, refusal_axes

__all__ = [
    "AttackedModel",
    "PrefillSweep",
    "PrefilledReply",
    "RefusalAxis",
    "compliance_ids",
    "depth_effects",
    "depth_shares",
    "judge_replies",
    "prefill_sweep",
    "refusal_axes",
    "replies_by_length",
    "trajectories",
]
