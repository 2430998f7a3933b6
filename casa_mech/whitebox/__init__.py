"""Attacks with the model's gradients, on the gate and on the model: the honest limit of the method.

The paper that proposes the gate has no adaptive attack. Each attack here comes in two kinds: by an attacker who does
not know of the gate and wants the base model to comply (aim "compliance"), and by one who knows it (all other aims).
Success is always measured on the real input, a PNG, a 16-bit clip or a text, through the ordinary `Casa.generate`.
"""

from casa_mech.whitebox.ablation import ablate, ablated
from casa_mech.whitebox.front_end import log_mel, patches, processed_picture
from casa_mech.whitebox.gcg import SuffixSettings, ordinary_words, suffix_attack
from casa_mech.whitebox.objective import AWARE, Aim, Losses, Objective
from casa_mech.whitebox.pgd import PgdSettings, pgd_pixels, pgd_waveform
from casa_mech.whitebox.results import AttackResult, Measured, measure, result_frame, save_media

__all__ = [
    "AWARE",
    "Aim",
    "AttackResult",
    "Losses",
    "Measured",
    "Objective",
    "PgdSettings",
    "SuffixSettings",
    "ablate",
    "ablated",
    "log_mel",
    "measure",
    "ordinary_words",
    "patches",
    "pgd_pixels",
    "pgd_waveform",
    "processed_picture",
    "result_frame",
    "save_media",
    "suffix_attack",
]
