"""Circuit breakers (arXiv 2406.04313): the states of harmful completions are turned away from what they were.

Representation rerouting with the authors' losses, schedule and LoRA (docs/method.md §5.2), on text alone as CASA.
"""

from __future__ import annotations

from collections.abc import Sequence

from casa_mech.casa.config import TrainSettings
from casa_mech.casa.trainer import Row
from casa_mech.defenses.base import Description
from casa_mech.defenses.rerouting import CircuitBreakerSettings, Rerouting
from casa_mech.defenses.trained import Tuned
from casa_mech.omni import Omni
from casa_mech.queries import Example


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
            failed=self.failed,
        )

    def _failure(self, log: Sequence[Row]) -> str:
        return self.config.failure(log)

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
            gradient_checkpointing=config.gradient_checkpointing,
            precision="full",  # its losses compare the states of two forwards
            checkpoint_every=config.checkpoint_every,
        )
