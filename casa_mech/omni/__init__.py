"""The model under study: the only package that knows what Qwen2.5-Omni looks like."""

from casa_mech.omni.architecture import Architecture
from casa_mech.omni.batch import OmniBatch
from casa_mech.omni.load import load_omni
from casa_mech.omni.model import GenerationSettings, Omni, with_system

__all__ = ["Architecture", "GenerationSettings", "Omni", "OmniBatch", "load_omni", "with_system"]
