from . import activations, gate, lens, linear, prefill
from .activations import Activations, ActivationStore, collect
from .gate import (
    MatchedPair,
    attention_maps,
    attribute_token_difference,
    look,
    minimal_sets,
    patch_effects,
    reliability,
)
from .lens import ablate_heads, bridge, fit_translators, logit_lens, register
from .linear import (
    DifferenceInMeans,
    LogisticProbe,
    PromptProbe,
    RefusalDirection,
    cross_validate,
    find_refusal_direction,
    fit_probe,
    transfer_matrix,
)
from .prefill import AttackedModel, prefill_sweep

__version__: str
__all__ = [
    "ActivationStore",
    "Activations",
    "AttackedModel",
    "DifferenceInMeans",
    "LogisticProbe",
    "MatchedPair",
    "PromptProbe",
    "RefusalDirection",
    "ablate_heads",
    "activations",
    "attention_maps",
    "attribute_token_difference",
    "bridge",
    "collect",
    "cross_validate",
    "find_refusal_direction",
    "fit_probe",
    "fit_translators",
    "gate",
    "lens",
    "linear",
    "logit_lens",
    "look",
    "minimal_sets",
    "patch_effects",
    "prefill",
    "prefill_sweep",
    "register",
    "reliability",
    "transfer_matrix",
]
