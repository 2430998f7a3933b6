"""Published defences behind one interface, each in a file of its own."""

from casa_mech.defenses.base import Defense, DefenseSettings, Description
from casa_mech.defenses.registry import DEFENSES, DefenseEntry, load_defense
from casa_mech.defenses.training import train_defense

__all__ = ["DEFENSES", "Defense", "DefenseSettings", "Description", "DefenseEntry", "load_defense", "train_defense"]
