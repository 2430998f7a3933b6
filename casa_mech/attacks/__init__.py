"""Attacks: pure functions from a query to an attacked query, and the speech and pictures they are made with."""

from casa_mech.attacks.audio import AUDIO_PHRASE, spoken_letters, spoken_word
from casa_mech.attacks.image import IMAGE_PHRASE, image_word
from casa_mech.attacks.jailbreak import jailbreak, wrappers, wrappers_of
from casa_mech.attacks.prefill import PREFILL_LENGTHS, prefill
from casa_mech.attacks.registry import ATTACKS, AttackContext, apply_attack
from casa_mech.attacks.render import RenderSettings, render_word
from casa_mech.attacks.text import letters_of, spell, spell_ahead
from casa_mech.attacks.voice import EspeakVoice, Voice, VoiceSettings, add_noise, draw_settings, spell_clip

__all__ = [
    "ATTACKS",
    "AUDIO_PHRASE",
    "IMAGE_PHRASE",
    "PREFILL_LENGTHS",
    "AttackContext",
    "EspeakVoice",
    "RenderSettings",
    "Voice",
    "VoiceSettings",
    "add_noise",
    "apply_attack",
    "draw_settings",
    "image_word",
    "jailbreak",
    "letters_of",
    "prefill",
    "render_word",
    "spell",
    "spell_ahead",
    "spell_clip",
    "spoken_letters",
    "spoken_word",
    "wrappers",
    "wrappers_of",
]
