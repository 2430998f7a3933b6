"""What a study runs: its settings, and the sizes of its three profiles."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from casa_mech.errors import InputError, ModelError
from casa_mech.omni.checkpoint import speaks_micro_world
from casa_mech.plan.records import WORLD, read_plan

ProfileName = Literal["smoke", "default", "full"]
CLONE = Path(__file__).parents[2]
SMALL_BYTES = 200 * 2**20
"""Weights of a model that a machine with two cores holds a few times over; the organisms have 6 MB."""
ENGLISH = "english"
"""The shipped plan of models that read English."""
ORGANISM, CONTROL = "organism", "organism-split"
SHIPPED = {name: Path(__file__).parents[1] / "organism" / "weights" / name for name in (ORGANISM, CONTROL)}
"""Folders of the models in this package, known without importing torch."""


class Profile(BaseModel):
    """Sizes of a study."""

    model_config = ConfigDict(frozen=True)

    gates: int
    """Gates that are trained for each model, alike but for their training seed and examples."""
    n_eval: int
    """Replies in each cell of the attack table (attack × label): the pretrained model answers so many requests, each of
    the gates the first n_eval / gates of them. So a cell costs the same whatever the number of gates. It loses little:
    requests are about 74 topics, and more of them on the same topics hardly narrow an interval."""
    n_probe: int
    """Requests for each surface and label whose hidden states are read."""
    train_examples: int
    """CASA's training examples, half of them harmful."""
    train_steps: int
    """Optimiser steps of CASA's training."""
    train_batch: int
    """Examples in a step."""
    max_new_tokens: int
    """Upper bound on a reply's tokens."""
    batch_size: int
    """Queries in one forward or generation."""


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "smoke": Profile(
            gates=1,
            n_eval=24,
            n_probe=30,
            train_examples=256,
            train_steps=40,
            train_batch=32,
            max_new_tokens=32,
            batch_size=32,
        ),
        "default": Profile(
            gates=3,
            n_eval=600,
            n_probe=150,
            train_examples=2000,
            train_steps=200,
            train_batch=32,
            max_new_tokens=32,
            batch_size=64,
        ),
        "full": Profile(
            gates=5,
            n_eval=1000,
            n_probe=400,
            train_examples=6000,
            train_steps=600,
            train_batch=64,
            max_new_tokens=32,
            batch_size=64,
        ),
    }
)


class StudySettings(BaseModel):
    """One study. A run folder is bound to these, but for the device, which may change between a stop and a resume."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = ORGANISM
    """A shipped organism, a hub id or a directory; a directory is kept as an absolute path, wherever notebooks run."""
    plan: str = ""
    """What it is about: a plan's name or YAML file (`casa_mech.plan.read_plan`; kept as an absolute path); empty: the
    micro-world for an organism, `english` for any other model."""
    control: str = ""
    """A second model for the attack table; empty: `organism-split` beside `organism`, otherwise none."""
    profile: ProfileName = "default"
    """Which of `PROFILES` gives the sizes."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw and training."""
    device: str = "auto"
    """As for `load_omni`."""
    dtype: str = "auto"
    """As for `load_omni`."""

    @field_validator("model", "control")
    @classmethod
    def _absolute(cls, model: str) -> str:
        is_folder = model not in SHIPPED and model and Path(model).is_dir()
        return os.path.abspath(model) if is_folder else model

    @field_validator("plan")
    @classmethod
    def _absolute_plan(cls, plan: str) -> str:
        return os.path.abspath(plan) if plan.endswith((".yaml", ".yml")) else plan

    @property
    def plan_name(self) -> str:
        """The plan, chosen by the model where none is given; a model that is not there says so when it is loaded."""
        if self.plan:
            return self.plan
        with suppress(ModelError):
            return WORLD if speaks_micro_world(self.model) else ENGLISH
        return ENGLISH

    @property
    def sizes(self) -> Profile:
        """The profile's numbers, and those that the plan has in their place."""
        profile = PROFILES[self.profile]
        if self.plan_name == WORLD:
            return profile
        return profile.model_copy(update=read_plan(self.plan_name).sizes.get(self.profile, {}))

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the attack table."""
        control = self.control or (CONTROL if self.model == ORGANISM else "")
        return (self.model, control) if control else (self.model,)

    @property
    def is_small(self) -> bool:
        """True where several processes may each hold the models: all of them are small and on the CPU."""
        sizes = [checkpoint_bytes(model) for model in self.models]
        return all(size is not None and size <= SMALL_BYTES for size in sizes) and self.device in ("auto", "cpu")

    @property
    def identity(self) -> dict[str, str | int]:
        """What a run folder is bound to. Models are held to it by name here, by fingerprint in each artifact's key."""
        names: dict[str, str | int] = {
            "model": self.model,
            "control": self.control,
            "profile": self.profile,
            "seed": self.seed,
        }
        return names if self.plan_name == WORLD else {**names, "plan": self.plan_name}

    @property
    def default_folder(self) -> Path:
        """Where the run goes unless said otherwise: `runs/<model>-<profile>-seed<seed>` under the working directory.

        Anywhere in a clone it is the clone's own `runs`, so that a notebook in Jupyter finds what `make study` made.
        """
        here = Path.cwd()
        base = CLONE if here.is_relative_to(CLONE) else here
        plan = "" if self.plan_name == WORLD else f"-{slug(self.plan_name.removesuffix('.yaml'))}"
        return base / "runs" / f"{slug(self.model)}{plan}-{self.profile}-seed{self.seed}"


def settings_of(**fields: object) -> StudySettings:
    """`StudySettings` from untyped fields (a notebook's or the shell's).

    Raises:
        InputError: a value that does not fit, named.
    """
    from pydantic import ValidationError

    try:
        return StudySettings.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}") from None


def slug(name: str) -> str:
    """`name` as part of a file name: the last piece of a hub id or path, other characters dashed."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").split("/")[-1]).strip("-") or "model"


def checkpoint_bytes(model: str) -> int | None:
    """Bytes of a model's weights, from the files alone; None where they are not on this disk under that name."""
    files = list(SHIPPED.get(model, Path(model)).glob("*.safetensors")) if model else []
    return sum(file.stat().st_size for file in files) if files else None
