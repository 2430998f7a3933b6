"""The organism: a tiny Qwen2.5-Omni thinker trained on a harmless micro-world, shipped with the package."""

from casa_mech.organism.build import build
from casa_mech.organism.card import card, card_markdown
from casa_mech.organism.world import World, default_world

__all__ = ["World", "build", "card", "card_markdown", "default_world"]
