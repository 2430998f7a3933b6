"""The method: safety tokens, safety attention, logit rules, objective, trainer, `Casa`."""

from casa_mech.casa.attention import SafetyAttention
from casa_mech.casa.casa import Casa
from casa_mech.casa.config import CasaConfig, InferenceSettings, TrainSettings
from casa_mech.casa.gate import SafetyGate

__all__ = ["Casa", "CasaConfig", "InferenceSettings", "SafetyAttention", "SafetyGate", "TrainSettings"]
