"""Defences that choose a safety token before the reply: CASA, and its relatives without safety attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from casa_mech.casa import Casa, CasaConfig, TrainSettings
from casa_mech.casa.casa import REFUSAL
from casa_mech.casa.generation import Order
from casa_mech.casa.trainer import Row
from casa_mech.defenses.base import DefenseSettings, Description
from casa_mech.defenses.trained import TrainedDefense
from casa_mech.identity import digest_of
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Example, Query, Reply


class SafetyTokenSettings(DefenseSettings):
    """How safety tokens are used."""

    order: Order = "gate_first"
    """With a prefill: "gate_first", the token is chosen before it; "prefill_first", after it."""
    hard: bool = False
    """Answer unsafe queries with `refusal` instead of generating."""
    refusal: str = Field(default=REFUSAL, min_length=1)
    """The fixed reply to unsafe queries, with `hard`."""


class SafetyTokenDefense(TrainedDefense):
    """A `Casa`, with safety attention or without, as a defence. Subclasses name themselves and choose the form.

    Args:
        casa: attached to the model until `close`.
        settings: how the token is used.
        training: settings of a run of `train`.
    """

    source: ClassVar[str]
    """Where the method is from, for its description."""
    settings_type: ClassVar[type[SafetyTokenSettings]] = SafetyTokenSettings
    """The record of its options at test time."""

    def __init__(
        self, casa: Casa, settings: SafetyTokenSettings | None = None, training: TrainSettings = TrainSettings()
    ) -> None:
        super().__init__(casa.omni)
        self.casa, self.settings = casa, settings or self.settings_type()
        self._training_settings = training
        self._open = True

    @classmethod
    def attach(cls, omni: Omni, config: CasaConfig, training: TrainSettings = TrainSettings(), seed: int = 0) -> Self:
        """Untrained, on `omni`; `seed` is that of its initial values."""
        return cls(Casa.attach(omni, config, seed), None, training)

    @classmethod
    def load(cls, omni: Omni, path: Path, settings: SafetyTokenSettings) -> Self:
        """A saved gate on `omni` (see `Casa.from_pretrained`)."""
        return cls(Casa.from_pretrained(path, omni), settings)

    def train(
        self, examples: Sequence[Example], out: Path | None = None, resume: bool = False, progress: bool = True
    ) -> list[Row]:
        """As `Casa.train`."""
        return self.casa.train(examples, self._training_settings, out, resume, progress)

    def save_pretrained(self, directory: Path | str) -> None:
        """As `Casa.save_pretrained`."""
        self.casa.save_pretrained(directory)

    def scores(self, queries: Sequence[Query], settings: GenerationSettings = GenerationSettings()) -> list[float]:
        """v_s of each query; without safety attention, the unsafe token's share of the pair's probability.

        Raises:
            ModelError: as `Casa.decide`.
        """
        queries = self._prepared(queries, settings)
        scores = []
        for reply in self.casa.decide(queries, settings, order=self.settings.order):
            assert reply.v_s is not None
            scores.append(reply.v_s)
        return scores

    def describe(self) -> Description:
        """LoRA, two token rows and, in CASA, safety attention; one token more than the reply has.

        A safe prompt that the base answers is read twice, and a re-check is a forward, too.
        """
        groups, inference = self.casa.parts.groups(), self.casa.config.inference
        return Description(
            name=self.name,
            changes=("weights", "logits"),
            forwards_per_token=1.0 + (1 / inference.recheck_every if inference.recheck_every else 0.0),
            extra_forwards=1.0 + inference.drop_after_safe,
            trained_parameters=sum(value.numel() for group in groups for value in group.values()),
            source=self.source,
            safety_prompt=self.safety_prompt,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """As for any defence, and safety attention, which is not among the model's weights."""
        weights = sorted(self.casa.parts.groups()[1].items())
        pieces = (piece for name, value in weights for piece in (name, value.detach().cpu().numpy().tobytes()))
        config, calibration = self.casa.config.model_dump_json(), self.casa.calibration.digest
        return super().identity | {"gate": digest_of([config, *pieces, *([calibration] if calibration else [])])}

    def close(self) -> None:
        """Detach it; the model is the base again."""
        if self._open:
            self.casa.detach()
            self._open = False

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        return self.casa.generate(queries, settings, progress=progress, **self._use())

    def _use(self) -> dict[str, Any]:
        """Arguments of `Casa.generate` that say how the token is used."""
        return {"order": self.settings.order, "hard": self.settings.hard, "refusal": self.settings.refusal}
