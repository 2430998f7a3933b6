"""Circuit breakers (arXiv 2406.04313): the states of harmful completions are turned away from what they were.

Representation rerouting with the authors' losses, schedule and LoRA (method notes §5.2), on text alone as CASA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from casa_mech.casa.config import LoraSettings, TrainSettings
from casa_mech.defenses.base import Description
from casa_mech.defenses.rerouting import Rerouting
from casa_mech.defenses.trained import Tuned
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Example

DEPTHS = (0.3125, 0.625)
"""Depth of the target layers: 10 and 20 of 32."""


class CircuitBreakerSettings(LoraSettings):
    """Circuit breakers; the defaults are those published for Llama-3-8B."""

    lora_alpha: int = Field(default=16, ge=1)
    alpha: float = Field(default=10.0, gt=0)
    """Scale of both losses (Mistral-7B: 5)."""
    layers: tuple[int, ...] | None = None
    """Target layers, counted in blocks passed (layer l is the residual stream after l blocks, as in the authors'
    code); default, 0.3125 and 0.625 of the depth."""
    max_steps: int = Field(default=150, ge=1)
    """Optimiser steps."""
    horizon: int | None = Field(default=None, ge=1)
    """2T₀ of the schedule; default, twice `max_steps`, so that both weights end at half of `alpha`."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences a step in the circuit-breaker batch, and in the retain batch."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Sequences a forward; the gradients of a batch's parts are averaged."""
    blank_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the harmful completions that are rerouted without their request (Llama: half; Mistral: none)."""
    refusal_share: float = Field(default=0.25, ge=0, le=1)
    """Share of refusals to harmful requests in the retain batch; the rest are benign answers."""
    lr: float | None = Field(default=None, gt=0)
    """Constant learning rate; default, the published 1e-4 from d_model 1024 on, else 1e-2.

    At the start the states are the frozen ones, and a cosine has no slope at its maximum. Whether rerouting gets away
    from there before retaining holds it back depends on the size of the first steps. On the organism, whose states are
    about 40 long, L_rr stayed at 1 with rates up to 5e-3; 1e-2 was the first of six tried with which it fell.
    """
    max_reply_tokens: int = Field(default=512, ge=1)
    """Replies are cut to this many tokens."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints (only with an output folder)."""
    seed: int = Field(default=0, ge=0)

    @property
    def two_t0(self) -> int:
        """2T₀ of the schedule, in steps."""
        return self.horizon or 2 * self.max_steps

    def target_layers(self, n_layers: int) -> list[int]:
        """The target layers in a model of `n_layers` blocks, rising.

        Raises:
            InputError: a layer that it does not have.
        """
        # Halves are rounded up: 18 of 28, 23 of 36.
        wanted = self.layers or [max(1, int(depth * n_layers + 0.5)) for depth in DEPTHS]
        if not 1 <= min(wanted) <= max(wanted) <= n_layers:
            raise InputError(f"layers={tuple(wanted)}: a model of {n_layers} blocks has layers 1 to {n_layers}")
        return sorted(set(wanted))

    def learning_rate(self, d_model: int) -> float:
        """The constant learning rate for a model of width `d_model`."""
        return self.lr or (1e-4 if d_model >= 1024 else 1e-2)

    def depth(self, n_layers: int) -> int:
        """How many blocks get a LoRA, and are retained: one beyond the last target layer, as published."""
        return min(n_layers, max(self.target_layers(n_layers)) + 1)

    @model_validator(mode="after")
    def _schedule_holds(self) -> Self:
        if self.two_t0 < self.max_steps:
            raise InputError(f"horizon={self.horizon} is shorter than max_steps={self.max_steps}: rerouting would end")
        return self


class CircuitBreaker(Tuned):
    """A LoRA that reroutes the states of harmful completions and leaves all others where they were."""

    name = "circuit-breaker"
    config_type = CircuitBreakerSettings
    about = "Circuit breakers (representation rerouting, arXiv 2406.04313), trained on text alone."
    config: CircuitBreakerSettings

    def __init__(
        self, omni: Omni, config: CircuitBreakerSettings = CircuitBreakerSettings(), seed: int | None = None
    ) -> None:
        super().__init__(omni, config, config.seed if seed is None else seed)

    def describe(self) -> Description:
        """A LoRA, merged for decoding."""
        return Description(
            name=self.name,
            changes=("weights",),
            trained_parameters=self.trained_parameters,
            source="circuit breakers, arXiv 2406.04313",
            safety_prompt=self.safety_prompt,
        )

    def _layers(self) -> Sequence[int]:
        return range(self.config.depth(self.omni.n_layers))

    def _learner(self, examples: Sequence[Example]) -> Rerouting:
        return Rerouting(self.omni, self._attached, self.config, examples)

    def _loop(self) -> TrainSettings:
        config = self.config
        return TrainSettings(
            max_steps=config.max_steps,
            batch_size=2 * config.batch_size,
            micro_batch_size=config.micro_batch_size,
            lr_lora=config.learning_rate(self.omni.d_model),
            warmup=0.0,
            max_reply_tokens=config.max_reply_tokens,
            seed=config.seed,
            validation=0.0,
            patience=None,
            checkpoint_every=config.checkpoint_every,
        )
