"""The rows of a comparison: a defence by name with its options, in training and at test time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, model_validator

from casa_mech.casa.calibration import Calibration
from casa_mech.casa.config import Settings, TrainSettings
from casa_mech.defenses.casa import CasaSettings
from casa_mech.defenses.registry import DEFENSES, DefenseEntry, defense_entry, options, training_options
from casa_mech.errors import InputError
from casa_mech.evaluation.training import Benign
from casa_mech.queries.files import QuerySource

PROMPTED = "+safety-prompt"
"""End of a name on the command line that switches the safety prompt on."""
DEFAULT_DEFENSES = (
    "none", "safety-prompt", "ssft", "ssft-token", "refusal-token", "circuit-breaker", "casa", f"casa{PROMPTED}",
    "casa-scale", "casa-scale-replace", "coca", "safecode", "safecode-code", "moras", "any-depth",
)  # fmt: skip
SEEDS = (0, 1, 2, 3, 4)
"""Of training and draws, unless others are named."""
REFERENCE = "casa"
"""The row that all others are tested against."""


class ComparedSystem(Settings):
    """One row: a defence, how it is trained and how it is used."""

    defense: str
    """One of the known defences."""
    safety_prompt: bool = False
    """Put the safety prompt into every system turn."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its options at test time."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Its options in training, where they differ from those of all."""
    examples: int | None = Field(default=None, ge=4)
    """Number of training examples; None for as many as the others get."""
    benign: Benign | None = None
    """The benign half of the micro-world's examples; None for what the others get."""
    tuning: tuple[QuerySource, ...] = ()
    """CoCA without an alpha: queries of both labels that alpha is chosen on (see `tuning`), none of them in a column.
    Empty: the micro-world's calibration requests."""
    path: str | None = None
    """Folder of trained weights; `{seed}` stands for the seed. None: they are trained."""
    name: str = ""
    """Its name in the tables; empty for the defence's own, with the safety prompt behind it where it is on."""

    @property
    def label(self) -> str:
        """Its name in the tables."""
        prompted = self.safety_prompt and self.defense != "safety-prompt"
        return self.name or (f"{self.defense} + safety prompt" if prompted else self.defense)

    @property
    def entry(self) -> DefenseEntry:
        """The defence's entry in the registry."""
        return defense_entry(self.defense)

    @property
    def trains(self) -> bool:
        """True where it has weights of its own."""
        return self.entry.trains

    @property
    def calibrates(self) -> bool:
        """True where it is calibrated on requests of the micro-world: it needs a calibration and no queries are named
        for it, nor a folder that may hold one."""
        if self.entry.settings is not CasaSettings or self.path or self.options.get("calibration"):
            return False
        config = training_options(self.defense, self.training)[0]
        (used,) = options(self.defense, (self.entry.settings,), self.options)
        inference = config.changed(**used.changes).inference
        return bool(Calibration().lacks(inference))

    @property
    def tunes(self) -> bool:
        """True for CoCA without an alpha, which is chosen for the model then."""
        return self.defense == "coca" and "alpha" not in self.options

    def folder(self, seed: int) -> Path | None:
        """The folder of its trained weights where it has one (`path`), for this seed; else None."""
        return None if self.path is None else Path(self.path.replace("{seed}", str(seed)))

    def used(self, seed: int) -> dict[str, Any]:
        """Its options at test time, with the grid's seed where the defence has one of its own."""
        seeded = {"seed": seed} if "seed" in self.entry.settings.model_fields else {}
        return {**seeded, **self.options}

    def settings(self, seed: int) -> dict[str, Any]:
        """All options at test time, the defaults written out, as JSON values."""
        (record,) = options(self.defense, (self.entry.settings,), self.used(seed))
        dumped: dict[str, Any] = json.loads(record.model_dump_json())
        return dumped

    @model_validator(mode="after")
    def _fits(self) -> Self:
        options(self.defense, (self.entry.settings,), self.options)
        recipe = self.entry.recipe
        if recipe is None and (self.training or self.path or self.examples or self.benign):
            raise InputError(f"defense {self.defense!r} is not trained: leave out training, examples, benign and path")
        if recipe is not None:
            training_options(self.defense, self.training)
        if self.tunes and "base" in self.options:
            raise InputError(f"{self.label!r}: alpha is chosen with the principle's logits as base; leave base out")
        if self.tuning and not self.tunes:
            raise InputError(f"{self.label!r}: tuning is for coca without an alpha of its own; leave it out")
        return self


_SCALED: dict[str, Any] = {"defense": "casa", "training": {"rule": "scale"}}
NAMED_ROWS: Mapping[str, ComparedSystem] = MappingProxyType(
    {
        row.name: row
        for row in (
            ComparedSystem(name="casa-scale", **_SCALED),
            ComparedSystem(name="casa-scale-replace", options={"inference_rule": "replace"}, **_SCALED),
            ComparedSystem(name="safecode-code", defense="safecode", options={"mode": "code"}),
        )
    }
)
"""Defences with options of their own that have a name: CASA under the paper's rule, throughout and with the rule that a
second description has at inference (docs/method.md §1.2, conflict C), and SafeCoDe as its program does it."""


def system_named(text: str) -> ComparedSystem:
    """The row of a name on the command line: `casa`, `casa+safety-prompt`, or one of `NAMED_ROWS`.

    Raises:
        InputError: no such defence; the known ones are listed.
    """
    name, plus, switch = text.strip().partition("+")
    if name not in (*DEFENSES, *NAMED_ROWS) or (plus and f"+{switch}" != PROMPTED):
        raise InputError(
            f"unknown defense {text.strip()!r}; defenses: {', '.join((*DEFENSES, *NAMED_ROWS))}, each also with "
            f"{PROMPTED} behind it"
        )
    if name in DEFENSES:
        return ComparedSystem(defense=name, safety_prompt=bool(plus))
    row = NAMED_ROWS[name]
    return row.model_copy(update={"safety_prompt": True, "name": f"{name} + safety prompt"}) if plus else row


def check_systems(systems: Sequence[ComparedSystem]) -> None:
    """Refuse rows that the tables could not tell apart.

    Raises:
        InputError: no row, or two of one name.
    """
    if not systems:
        raise InputError(f"a comparison needs at least one defense; defenses: {', '.join(DEFENSES)}")
    labels = [system.label for system in systems]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"two rows are called {twice!r}: name each once, or give them names of their own")


def training_records(system: ComparedSystem, shared: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], list[Any]]:
    """A row's options in training, and the records they make, the defaults written out.

    `shared` are the settings that all supervised trainings have in common; circuit breakers, whose schedule is their
    own, take its number of steps where it is shorter than that.
    """
    recipe = system.entry.recipe
    assert recipe is not None
    if TrainSettings in recipe.records:
        settings = dict(shared)
    else:
        steps, scheduled = shared.get("max_steps"), recipe.records[0].model_fields["schedule_steps"].default
        settings = {} if steps is None or int(steps) >= scheduled else {"max_steps": int(steps)}
    settings |= {"seed": seed, **system.training}
    return settings, training_options(system.defense, settings)
