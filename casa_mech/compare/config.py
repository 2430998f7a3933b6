"""A comparison's queries from a YAML file: public sets by name, an attack on each, the judge, and the training set."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from casa_mech.attacks import PROMPT_SLOTS, attack_named
from casa_mech.compare.systems import SEEDS, ComparedSystem, system_named
from casa_mech.compare.weights import ExampleTable
from casa_mech.errors import InputError
from casa_mech.evaluation.training import Benign
from casa_mech.limits import GREATEST_SEED
from casa_mech.omni import GenerationSettings
from casa_mech.plan.records import AS_IT_IS, AttackSection, JudgeSection, QuerySection, Section, read_yaml

EXAMPLE = "paper_table.yaml"


class SetSection(AttackSection):
    """One column of the table: a set under an attack, and the benign queries that get the same attack."""

    name: str
    """Of the column."""
    harmful: QuerySection | None = None
    """Queries that should be refused."""
    benign: QuerySection | None = None
    """Queries that should be answered; as many as the harmful ones get the same draws, pair by pair."""
    attack: str = AS_IT_IS
    """The attack by name; `none` leaves the queries as they are."""

    @field_validator("attack")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != AS_IT_IS:
            attack_named(name)
        return name

    @model_validator(mode="after")
    def _holds(self) -> Self:
        if self.harmful is None and self.benign is None:
            raise InputError(f"the set {self.name!r} needs harmful or benign queries, or both")
        if self.prompt_file is not None and self.attack not in PROMPT_SLOTS:
            raise InputError(f"prompt_file is for the attacks {', '.join(PROMPT_SLOTS)}, not {self.attack}")
        return self


class TrainingSection(Section):
    """How trained rows are trained."""

    examples: ExampleTable | None = None
    """On what; None: the micro-world's examples."""
    benign: Benign = "plain"
    """The benign half of the micro-world's examples."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that all supervised trainings share."""


class CompareConfig(Section):
    """A comparison at full size: what the YAML file holds."""

    data: Path | None = None
    """The folder of the public sets; None: what CASA_MECH_DATA names, else the hub."""
    sets: tuple[SetSection, ...] = Field(min_length=1)
    """The columns."""
    defenses: tuple[ComparedSystem, ...] = ()
    """The rows, each a name or a record of `ComparedSystem`; empty for all."""
    judge: JudgeSection = JudgeSection()
    """Who judges the replies."""
    generation: GenerationSettings = GenerationSettings(max_new_tokens=512, batch_size=8)
    """How replies are generated."""
    training: TrainingSection | None = None
    """None: on the micro-world's examples."""
    seeds: tuple[Annotated[int, Field(ge=0, le=GREATEST_SEED)], ...] = SEEDS
    """Seeds of training and draws; those of the command line win."""
    timing_rounds: int = Field(default=3, ge=0)
    """Rounds of timing, 0 for none."""

    @field_validator("defenses", mode="before")
    @classmethod
    def _named(cls, rows: Any) -> Any:
        if not isinstance(rows, Sequence) or isinstance(rows, str):
            return rows
        return [system_named(row) if isinstance(row, str) else row for row in rows]

    @model_validator(mode="after")
    def _no_name_twice(self) -> Self:
        names = [plan.name for plan in self.sets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"two sets are called {twice!r}: give each a name of its own")
        return self


def read_config(path: Path) -> CompareConfig:
    """The comparison that a YAML file describes; relative paths in it are relative to its folder.

    Raises:
        InputError: no such file, no YAML (with the line), or a key or value that cannot be used (with the key).
    """
    return read_yaml(path, CompareConfig, "casa-mech compare --example prints a whole file")


def example() -> str:
    """The shipped example: the table of CASA's paper."""
    return (files("casa_mech.compare") / EXAMPLE).read_text(encoding="utf-8")
