from . import activations, detector, gate, lens, linear, prefill
from .activations import Activations, ActivationStore, collect
from .detector import ProbeReport, PromptProbe, Threshold, train
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
    RefusalDirection,
    cross_validate,
    dose_response,
    find_refusal_direction,
    fit_erasure,
    plot_probes,
    steer,
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
    "ProbeReport",
    "PromptProbe",
    "RefusalDirection",
    "Threshold",
    "ablate_heads",
    "activations",
    "attention_maps",
    "attribute_token_difference",
    "bridge",
    "collect",
    "cross_validate",
    "detector",
    "dose_response",
    "find_refusal_direction",
    "fit_erasure",
    "fit_translators",
    "gate",
    "lens",
    "linear",
    "logit_lens",
    "look",
    "minimal_sets",
    "patch_effects",
    "plot_probes",
    "prefill",
    "prefill_sweep",
    "register",
    "reliability",
    "steer",
    "train",
    "transfer_matrix",
]
