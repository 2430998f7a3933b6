"""Attacks: pure functions from a query to an attacked query, and the speech and pictures they are made with."""

from casa_mech.attacks.aiah import aiah
from casa_mech.attacks.audio import AUDIO_PHRASE, Speech, distractor, spoken_letters, spoken_question, spoken_word
from casa_mech.attacks.dialogue import multi_turn, split
from casa_mech.attacks.fonts import FontChoice, find_font
from casa_mech.attacks.image import IMAGE_PHRASE, figstep, figstep_as_text, image_word, rendered, sd_typo, typo
from casa_mech.attacks.jailbreak import jailbreak, read_wrappers, wrappers, wrappers_of
from casa_mech.attacks.prefill import PREFILL_LENGTHS, prefill
from casa_mech.attacks.prompt_file import PROMPT_SLOTS, read_prompt
from casa_mech.attacks.registry import (
    ATTACKS,
    STUDY_ATTACKS,
    AttackContext,
    apply_attack,
    apply_to_pairs,
    attack_named,
    media_of,
)
from casa_mech.attacks.render import RenderSettings, render_word
from casa_mech.attacks.seeding import paired
from casa_mech.attacks.text import letter_spaced, letters_of, spell
from casa_mech.attacks.typography import figstep_picture, page_picture, typo_picture
from casa_mech.attacks.voice import EspeakVoice, Voice, VoiceSettings, add_noise, draw_settings, spell_clip
from casa_mech.attacks.wording import ENGLISH, Wording

__all__ = [
    "ATTACKS",
    "AUDIO_PHRASE",
    "ENGLISH",
    "IMAGE_PHRASE",
    "PREFILL_LENGTHS",
    "PROMPT_SLOTS",
    "STUDY_ATTACKS",
    "AttackContext",
    "EspeakVoice",
    "FontChoice",
    "RenderSettings",
    "Speech",
    "Voice",
    "VoiceSettings",
    "Wording",
    "add_noise",
    "aiah",
    "apply_attack",
    "apply_to_pairs",
    "attack_named",
    "distractor",
    "draw_settings",
    "figstep",
    "figstep_as_text",
    "figstep_picture",
    "find_font",
    "image_word",
    "jailbreak",
    "letter_spaced",
    "letters_of",
    "media_of",
    "multi_turn",
    "page_picture",
    "paired",
    "prefill",
    "read_prompt",
    "read_wrappers",
    "render_word",
    "rendered",
    "sd_typo",
    "spell",
    "spell_clip",
    "split",
    "spoken_letters",
    "spoken_question",
    "spoken_word",
    "typo",
    "typo_picture",
    "wrappers",
    "wrappers_of",
]
