from .attribution import Attribution, attribute_token_difference
from .calibration import Reliability, reliability, spiegelhalter
from .looks import Look, look
from .pairs import MatchedPair, aligned_pairs
from .patching import PatchEffects, Target, ablate_directions, default_targets, patch_effects
from .paths import path_effects
from .positions import position_roles
from .removal import MinimalSet, minimal_sets, sets_table
from .safety_attention import AttentionMap, MediumMap, attention_maps, attention_shares, cosine_table, gate_directions
from .surfaces import surface_effects

__all__ = [
    "AttentionMap",
    "Attribution",
    "Look",
    "MatchedPair",
    "MediumMap",
    "MinimalSet",
    "PatchEffects",
    "Reliability",
    "Target",
    "ablate_directions",
    "aligned_pairs",
    "attention_maps",
    "attention_shares",
    "attribute_token_difference",
    "cosine_table",
    "default_targets",
    "gate_directions",
    "look",
    "minimal_sets",
    "patch_effects",
    "path_effects",
    "position_roles",
    "reliability",
    "sets_table",
    "spiegelhalter",
    "surface_effects",
]
