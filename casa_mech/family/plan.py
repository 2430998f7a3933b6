"""The plan of a map: which organisms are built, and how much is drawn, trained and audited on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from casa_mech.casa.config import Settings
from casa_mech.errors import InputError
from casa_mech.organism.premise_rows import MOST_TOKENS
from casa_mech.organism.premises import ALL, Premises
from casa_mech.organism.recipe import Recipe, recipe_of
from casa_mech.study.settings import PROFILES

SHIPPED = ("default", "smoke")
"""Plans by name, in `plans/`."""
_STARTS: Mapping[str, Premises] = {"all": ALL, "none": Premises()}
_STUDY = PROFILES["default"]


class Member(Settings):
    """One organism of the map."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """In tables and as the name of its folder."""
    start: Literal["all", "none"] = "all"
    """The premises it has before `knobs`: all of CASA's, or none."""
    knobs: tuple[str, ...] = ()
    """Changes of them, NAME=VALUE, on or off, as for `casa-mech organism build --knob`."""
    seed: int = Field(default=0, ge=0)
    """Of its training."""
    scale: float = Field(default=0.7, gt=0)
    """Factor on the steps of its training."""
    mends: bool = False
    """Whether the ways to mend a gate are tried on it."""

    @property
    def premises(self) -> Premises:
        """The knobs of its training."""
        return _STARTS[self.start].changed(self.knobs)

    @property
    def recipe(self) -> Recipe:
        """Its training."""
        return recipe_of(self.premises).scaled(self.scale)

    @model_validator(mode="after")
    def _known_knobs(self) -> Self:
        _ = self.premises
        return self


class Sizes(Settings):
    """How much is drawn and trained for each member. Gates are trained as those of the default study."""

    card: int = Field(default=150, ge=1)
    """Draws in each row of the card."""
    states: int = Field(default=600, ge=12)
    """Requests of both labels whose hidden states are read, on each surface, before a gate is trained."""
    audit: int = Field(default=150, ge=2)
    """Requests of each attack and label that are audited, and answered behind a mended gate."""
    examples: int = Field(default=_STUDY.train_examples, ge=8)
    """Training examples of a gate, half of them harmful."""
    steps: int = Field(default=_STUDY.train_steps, ge=1)
    """Optimiser steps of a gate."""
    batch: int = Field(default=_STUDY.train_batch, ge=2)
    """Examples in a step."""
    gate_seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of the gates' examples and training, a gate each."""
    max_new_tokens: int = Field(default=MOST_TOKENS, ge=1)
    """Upper bound on a reply's tokens, the card's."""
    seed: int = Field(default=0, ge=0)
    """Of the audited requests and all intervals; the same for every member, so that they answer the same requests."""


class Plan(Settings):
    """The members of a map, in the order in which they are begun, and its sizes."""

    members: tuple[Member, ...] = Field(min_length=1)
    """The organisms."""
    sizes: Sizes = Sizes()
    """The same for all of them."""

    @field_validator("members")
    @classmethod
    def _names_differ(cls, members: tuple[Member, ...]) -> tuple[Member, ...]:
        names = [member.name for member in members]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"two members are called {twice!r}: give each a name of its own")
        return members

    def named(self, names: Sequence[str]) -> list[Member]:
        """The members of these names, in the plan's order; all of them where no name is given.

        Raises:
            InputError: a name that no member has.
        """
        known = [member.name for member in self.members]
        for name in names:
            if name not in known:
                raise InputError(f"no member {name!r} in the plan; there are {', '.join(known)}")
        return [member for member in self.members if member.name in names or not names]


def plan_text(name: str) -> str:
    """The YAML of a shipped plan."""
    return (files("casa_mech.family") / "plans" / f"{name}.yaml").read_text(encoding="utf-8")


def read_plan(source: str = "default") -> Plan:
    """The plan of a name in `SHIPPED`, or of a YAML file.

    Raises:
        InputError: no such file, no YAML (with the line), or a key or value that cannot be used.
    """
    try:
        text = plan_text(source) if source in SHIPPED else Path(source).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"--plan {source} cannot be read ({reason}): give {', '.join(SHIPPED)} or a file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{source} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{source}: expected members and sizes; casa-mech family --example prints a whole file")
    try:
        return Plan(**content)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
