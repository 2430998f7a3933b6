"""Attacks by gradient: the options of a run, and the way from queries to measured results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from casa_mech.casa import Casa
from casa_mech.casa.config import Settings
from casa_mech.errors import InputError
from casa_mech.judging import Judge
from casa_mech.omni import GenerationSettings
from casa_mech.queries import Query
from casa_mech.whitebox.objective import Aim
from casa_mech.whitebox.results import AttackResult, Measured, measure

Optimise = Callable[[Sequence[Query]], tuple[Sequence[Sequence[Query]], Tensor]]
"""Queries → the attacked ones [report][query] after each of `reported` steps, and the margins of all steps
[step, query]."""


class GradientSettings(Settings):
    """One run of an attack by gradient."""

    aim: Aim = "joint"
    """The loss that is minimised (see `Aim`)."""
    steps: int = Field(default=20, ge=1)
    """Optimiser steps."""
    checkpoints: tuple[int, ...] = ()
    """Fewer steps after which the best so far is measured, too."""
    opening_tokens: int = Field(default=16, ge=1)
    """How many tokens of the complying answer are made likely; fewer may leave out what it is about."""
    watch: bool = True
    """Record the margins of an attacker who does not know of the gate, too (else they are NaN)."""
    batch_size: int = Field(default=16, ge=1)
    """Queries attacked at once."""
    seed: int = Field(default=0, ge=0)
    """Of every draw."""

    @model_validator(mode="after")
    def _checkpoints_within(self) -> Self:
        outside = [step for step in self.checkpoints if not 1 <= step < self.steps]
        if outside:
            raise InputError(f"checkpoints={outside[0]}: checkpoints are from 1 to fewer than the {self.steps} steps")
        return self

    @property
    def reported(self) -> tuple[int, ...]:
        """The step counts that there are results for."""
        return (*sorted(set(self.checkpoints)), self.steps)


def run_attack(
    casa: Casa,
    queries: Sequence[Query],
    settings: GradientSettings,
    optimise: Optimise,
    *,
    attack: str,
    budget: float,
    judge: Judge | None,
    generation: GenerationSettings,
    before: Sequence[Measured] | None,
) -> list[AttackResult]:
    """Optimise the queries in batches, then measure them through `Casa.generate`.

    Args:
        casa: the gate on its model. queries: to attack. settings: of the run.
        optimise: attacks one batch.
        attack, budget: as in `AttackResult`.
        judge, generation: as for `measure`. before: the clean queries, measured; None: measured here.

    Returns:
        For each of `settings.reported` a result for each query, in their order.
    """
    attacked: dict[tuple[int, int], Query] = {}
    margins: dict[int, list[float]] = {}
    for group in casa.omni.batches(queries, settings.batch_size):
        reports, trajectory = optimise([queries[index] for index in group])
        for row, index in enumerate(group):
            margins[index] = trajectory[:, row].tolist()
            for steps, examples in zip(settings.reported, reports, strict=True):
                attacked[steps, index] = examples[row]
    order = [(steps, index) for steps in settings.reported for index in range(len(queries))]
    before = before or measure(casa, queries, judge, generation)
    after = measure(casa, [attacked[key] for key in order], judge, generation)
    return [
        AttackResult(
            query=attacked[steps, index], attack=attack, aim=settings.aim, budget=budget, steps=steps,
            seed=settings.seed, before=before[index], after=measured, trajectory=tuple(margins[index][: steps + 1]),
        )
        for (steps, index), measured in zip(order, after, strict=True)
    ]  # fmt: skip
