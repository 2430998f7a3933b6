"""CASA as one defence among others (arXiv 2604.00310; docs/method.md §1)."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from casa_mech.casa import Casa
from casa_mech.casa.config import Form, Rule
from casa_mech.defenses.safety_token import SafetyTokenDefense, SafetyTokenSettings
from casa_mech.errors import InputError
from casa_mech.omni import Omni


class CasaSettings(SafetyTokenSettings):
    """How a trained CASA is used. Form and rule belong to its training; naming them makes sure of them."""

    form: Form | None = None
    """The form of safety attention that the gate must have; None takes any."""
    rule: Rule | None = None
    """The logit rule that the gate must have; None takes any."""


class CasaDefense(SafetyTokenDefense):
    """Safety tokens, safety attention and a LoRA."""

    name = "casa"
    source = "CASA, arXiv 2604.00310"
    settings_type = CasaSettings

    @classmethod
    def load(cls, omni: Omni, path: Path, settings: SafetyTokenSettings) -> Self:
        """A saved gate on `omni`.

        Raises:
            InputError: it was trained with another form or rule than `settings` name.
        """
        casa = Casa.from_pretrained(path, omni)
        for name in ("form", "rule"):
            wanted, trained = getattr(settings, name, None), getattr(casa.config, name)
            if wanted not in (None, trained):
                casa.detach()
                raise InputError(
                    f"{path} was trained with {name} {trained}, not {wanted}: train one with {name}={wanted}"
                )
        return cls(casa, settings)
