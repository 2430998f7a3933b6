"""The model through TransformerLens: a bridge, the logit lens, the tuned lens, and ablation of heads."""

from probes.lens.adapter import ThinkerArchitectureAdapter, register
from probes.lens.heads import HeadEffects, HeadPattern, ablate_heads, attention_patterns, summarise_heads
from probes.lens.logit import Trajectory, bridge, logit_lens
from probes.lens.tuned import Translators, fit_translators, lens_quality

__all__ = [
    "HeadEffects",
    "HeadPattern",
    "ThinkerArchitectureAdapter",
    "Trajectory",
    "Translators",
    "ablate_heads",
    "attention_patterns",
    "bridge",
    "fit_translators",
    "lens_quality",
    "logit_lens",
    "register",
    "summarise_heads",
]
