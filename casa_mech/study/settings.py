"""What a study runs: its settings, and the sizes of its three profiles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from casa_mech.errors import InputError

ProfileName = Literal["smoke", "default", "full"]
CLONE = Path(__file__).parents[2]
ORGANISM, CONTROL = "organism", "organism-split"


class Profile(BaseModel):
    """Sizes of a study.

    n_eval: requests in each cell of the attack table (attack × label).
    n_probe: requests for each surface and label whose hidden states are read.
    train_examples, train_steps, train_batch: CASA's training set (half harmful), optimiser steps, examples a step.
    max_new_tokens: upper bound on a reply.
    batch_size: queries in one forward or generation.
    """

    model_config = ConfigDict(frozen=True)

    n_eval: int
    n_probe: int
    train_examples: int
    train_steps: int
    train_batch: int
    max_new_tokens: int
    batch_size: int


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "smoke": Profile(
            n_eval=24, n_probe=30, train_examples=256, train_steps=40, train_batch=32, max_new_tokens=24, batch_size=32
        ),
        "default": Profile(
            n_eval=600,
            n_probe=150,
            train_examples=2000,
            train_steps=200,
            train_batch=32,
            max_new_tokens=24,
            batch_size=64,
        ),
        "full": Profile(
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
    """A shipped organism, a hub id or a directory."""
    control: str = Field(default="", validate_default=True)
    """A second model for the attack table; empty: `organism-split` beside `organism`, otherwise none."""
    profile: ProfileName = "default"
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    dtype: str = "auto"

    @property
    def sizes(self) -> Profile:
        """The profile's numbers."""
        return PROFILES[self.profile]

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the attack table."""
        control = self.control or (CONTROL if self.model == ORGANISM else "")
        return (self.model, control) if control else (self.model,)

    @property
    def identity(self) -> dict[str, str | int]:
        """What a run folder is bound to."""
        return {"model": self.model, "control": self.control, "profile": self.profile, "seed": self.seed}

    @property
    def default_folder(self) -> Path:
        """Where the run goes unless said otherwise: `runs/<model>-<profile>-seed<seed>` under the working directory.

        Anywhere in a clone it is the clone's own `runs`, so that a notebook in Jupyter finds what `make study` made.
        """
        here = Path.cwd()
        base = CLONE if here.is_relative_to(CLONE) else here
        return base / "runs" / f"{slug(self.model)}-{self.profile}-seed{self.seed}"


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
