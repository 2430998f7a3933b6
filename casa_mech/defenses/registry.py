"""The defences by name: what each is, how it is made, how it is trained and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from casa_mech.defenses.base import Defense
from casa_mech.defenses.none import NoSettings, Undefended
from casa_mech.errors import InputError
from casa_mech.omni import Omni


@dataclass(frozen=True)
class Entry:
    """One defence.

    name: as on the command line. settings: its options at test time, a frozen record. summary: one line.
    build: makes it on a model, for a defence without training. training: what a trained one is trained with. load:
    makes a trained one from the folder it was saved in. train: trains one; see `train_defense`.
    """

    name: str
    settings: type[BaseModel]
    summary: str
    build: Callable[[Omni, Any], Defense] | None = None

    @property
    def trains(self) -> bool:
        """Whether it has to be trained before it can be loaded."""
        return self.build is None


_ENTRIES = (
    Entry("none", NoSettings, "the model as it is", lambda omni, _: Undefended(omni)),
    Entry("safety-prompt", NoSettings, "the safety prompt alone", lambda omni, _: Undefended(omni, safety_prompt=True)),
    # Trained.
    # At decoding time.
)
DEFENSES: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""All defences, in the order of the comparison's rows."""


def defense_entry(name: str) -> Entry:
    """The entry of `name`.

    Raises:
        InputError: no such defence; the known ones are listed.
    """
    if name not in DEFENSES:
        raise InputError(f"unknown defense {name!r}; defenses: {', '.join(DEFENSES)}")
    return DEFENSES[name]


def load_defense(
    name: str, omni: Omni, *, safety_prompt: bool = False, path: Path | str | None = None, **settings: Any
) -> Defense:
    """A defence on `omni`, ready to answer.

    Args:
        name: one of `DEFENSES`.
        omni: the model; trained defences change it until they are closed.
        safety_prompt: put the safety prompt into every system turn.
        path: folder of a trained defence (`train_defense`, `casa-mech train`); none for the others.
        settings: its options at test time, fields of `DEFENSES[name].settings`.

    Raises:
        InputError: an unknown defence or option (the known ones are listed), or a path missing or not wanted.
        ModelError: the folder holds another defence, or does not fit the model.
    """
    entry = defense_entry(name)
    chosen = options(name, entry.settings, settings)
    if entry.build is None:
        raise InputError(f"{name} is not built yet")
    if path is not None:
        raise InputError(f"defense {name!r} is not trained, so there is nothing to load from {path}; leave it out")
    defense = entry.build(omni, chosen)
    defense.safety_prompt = defense.safety_prompt or safety_prompt
    return defense


def options(name: str, kind: type[BaseModel], given: Mapping[str, Any]) -> Any:
    """`given` as a record of `kind`, the options of the defence `name`.

    Raises:
        InputError: an unknown option (the known ones are listed), or a value that does not fit.
    """
    unknown = [option for option in given if option not in kind.model_fields]
    if unknown:
        known = ", ".join(kind.model_fields) or "none"
        raise InputError(f"defense {name!r} has no option {unknown[0]!r}; its options: {known}")
    return kind(**given)
