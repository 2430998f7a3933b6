"""The method: safety tokens, safety attention, logit rules, objective, trainer, `Casa`."""

from casa_mech.casa.attention import SafetyAttention
from casa_mech.casa.casa import Casa
from casa_mech.casa.config import CasaConfig, InferenceSettings, TrainSettings
from casa_mech.casa.gate import SafetyGate
from casa_mech.casa.open_gate import OpenGate

__all__ = ["Casa", "CasaConfig", "InferenceSettings", "OpenGate", "SafetyAttention", "SafetyGate", "TrainSettings"]
