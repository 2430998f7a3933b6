"""No defence, and the safety prompt alone: the baselines of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from casa_mech.defenses.base import Defense, DefenseSettings, Description
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply


class NoSettings(DefenseSettings):
    """A defence without options."""


class Undefended(Defense):
    """The model as it is; with `safety_prompt`, the model with nothing but the prompt (docs/method.md §1.7)."""

    def __init__(self, omni: Omni, safety_prompt: bool = False) -> None:
        super().__init__(omni, safety_prompt)
        self.name = "safety-prompt" if safety_prompt else "none"

    def describe(self) -> Description:
        """Nothing is changed, but the system turn where the safety prompt is switched on."""
        return Description(
            name=self.name,
            changes=("prompt",) if self.safety_prompt else (),
            source="the model as it was loaded" if self.name == "none" else "docs/method.md §1.7",
            safety_prompt=self.safety_prompt,
        )

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        return self.omni.generate(queries, settings, progress)
