from .architecture import Architecture
from .batch import OmniBatch
from .load import load_omni
from .model import GenerationSettings, Omni, with_system
from .stream import ReplyStream

__all__ = ["Architecture", "GenerationSettings", "Omni", "OmniBatch", "ReplyStream", "load_omni", "with_system"]
