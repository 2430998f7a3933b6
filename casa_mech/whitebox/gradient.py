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
from casa_mech.limits import GREATEST_SEED
from casa_mech.omni import GenerationSettings
from casa_mech.queries import Query
from casa_mech.whitebox.objective import Aim
from casa_mech.whitebox.results import AttackResult, Measured, measure

Optimise = Callable[[Sequence[Query], int], tuple[Sequence[Sequence[Query]], Tensor]]
"""Queries and the number of the start → the attacked ones [report][query] after each of `reported` steps, and the
margins of all steps [step, query]."""


class GradientSettings(Settings):
    """One run of an attack by gradient."""

    aim: Aim = "joint"
    """The loss that is minimised (see `Aim`)."""
    steps: int = Field(default=20, ge=1)
    """Optimiser steps."""
    restarts: int = Field(default=1, ge=1)
    """How many starts are tried, the first included; later ones for what no earlier one broke."""
    checkpoints: tuple[int, ...] = ()
    """Fewer steps after which the best so far is measured, too."""
    opening_tokens: int = Field(default=16, ge=1)
    """How many tokens of the complying answer are made likely; fewer may leave out what it is about."""
    watch: bool = True
    """Record the margins of an attacker who does not know of the gate, too (else they are NaN)."""
    batch_size: int = Field(default=16, ge=1)
    """Queries attacked at once."""
    seed: int = Field(default=0, ge=0, le=GREATEST_SEED)
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
    """Optimise the queries in batches from one start after the other, and measure them through `Casa.generate`.

    Of all starts that result is returned which gets furthest on the real input: a "safe" token and a complying reply,
    else a "safe" token, else the first start's. So further starts can only raise a rate, and every rate is a lower
    bound on that of the worst case.

    Args:
        casa: the gate on its model. queries: to attack. settings: of the run.
        optimise: attacks one batch.
        attack, budget: as in `AttackResult`.
        judge, generation: as for `measure`. before: the clean queries, measured; None: measured here.

    Returns:
        For each of `settings.reported` a result for each query, in their order.
    """
    before = before or measure(casa, queries, judge, generation)
    best: dict[tuple[int, int], AttackResult] = {}
    for start in range(settings.restarts):
        unbroken = [
            index
            for index in range(len(queries))
            if start == 0 or not all(best[steps, index].success for steps in settings.reported)
        ]
        if not unbroken:
            break
        attacked, margins = _optimised(casa, [queries[index] for index in unbroken], settings, optimise, start)
        after = measure(casa, list(attacked.values()), judge, generation)
        for ((steps, place), example), measured in zip(attacked.items(), after, strict=True):
            index = unbroken[place]
            result = AttackResult(
                query=example, attack=attack, aim=settings.aim, budget=budget, steps=steps, seed=settings.seed,
                before=before[index], after=measured, trajectory=tuple(margins[place][: steps + 1]), start=start,
            )  # fmt: skip
            if start == 0 or _reach(result) > _reach(best[steps, index]):
                best[steps, index] = result
    return [best[steps, index] for steps in settings.reported for index in range(len(queries))]


def start_purpose(attack: str, start: int) -> str:
    """What the draws of a start are for (`query_rng`): every start has its own, whatever the number of restarts."""
    return f"{attack}-{start}" if start else attack


def _optimised(
    casa: Casa, queries: Sequence[Query], settings: GradientSettings, optimise: Optimise, start: int
) -> tuple[dict[tuple[int, int], Query], dict[int, list[float]]]:
    """The attacked queries by steps and place, in the order of `settings.reported`, and the margins of each place."""
    attacked: dict[tuple[int, int], Query] = {}
    margins: dict[int, list[float]] = {}
    for group in casa.omni.batches(queries, settings.batch_size):
        reports, trajectory = optimise([queries[place] for place in group], start)
        for row, place in enumerate(group):
            margins[place] = trajectory[:, row].tolist()
            for steps, examples in zip(settings.reported, reports, strict=True):
                attacked[steps, place] = examples[row]
    order = [(steps, place) for steps in settings.reported for place in range(len(queries))]
    return {key: attacked[key] for key in order}, margins


def _reach(result: AttackResult) -> tuple[bool, bool]:
    return result.success, result.after.token == "safe"
