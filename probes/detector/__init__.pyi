from .calibration import Threshold
from .probe import PromptProbe
from .report import ProbeReport
from .training import train

__all__ = ["ProbeReport", "PromptProbe", "Threshold", "train"]
