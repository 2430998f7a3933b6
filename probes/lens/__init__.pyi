from .adapter import ThinkerArchitectureAdapter, register
from .heads import HeadEffects, HeadPattern, ablate_heads, attention_patterns, summarise_heads
from .logit import Trajectory, logit_lens
from .transformer_bridge import bridge, cached_states, hook_name
from .tuned import Translators, fit_translators, lens_quality

__all__ = [
    "HeadEffects",
    "HeadPattern",
    "ThinkerArchitectureAdapter",
    "Trajectory",
    "Translators",
    "ablate_heads",
    "attention_patterns",
    "bridge",
    "cached_states",
    "fit_translators",
    "hook_name",
    "lens_quality",
    "logit_lens",
    "register",
    "summarise_heads",
]
