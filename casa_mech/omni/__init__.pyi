from .architecture import Architecture
from .batch import OmniBatch
from .load import load_omni
from .model import GenerationSettings, Omni, with_system

__all__ = ["Architecture", "GenerationSettings", "Omni", "OmniBatch", "load_omni", "with_system"]
