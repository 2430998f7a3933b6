"""The defences by name: what each is, how it is built, trained and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from casa_mech.casa.config import MENDED, CasaConfig, TrainSettings
from casa_mech.defenses.any_depth import AnyDepth, AnyDepthSettings
from casa_mech.defenses.base import Defense
from casa_mech.defenses.casa import CasaDefense, CasaMended, CasaSettings
from casa_mech.defenses.circuit_breaker import CircuitBreaker
from casa_mech.defenses.coca import Coca, CocaSettings
from casa_mech.defenses.moras import Moras, MorasSettings
from casa_mech.defenses.none import NoSettings, Undefended
from casa_mech.defenses.refusal_token import RefusalToken, RefusalTokenSettings
from casa_mech.defenses.rerouting import CircuitBreakerSettings
from casa_mech.defenses.safecode import SafeCode
from casa_mech.defenses.safecode_decoding import SafeCodeSettings
from casa_mech.defenses.safety_token import SafetyTokenSettings
from casa_mech.defenses.ssft import Ssft, SsftSettings, SsftToken, SsftTokenSettings
from casa_mech.defenses.trained import TrainedDefense, saved_as
from casa_mech.errors import InputError, ModelError
from casa_mech.omni import Omni


@dataclass(frozen=True)
class DefenseRecipe:
    """How a defence is trained and loaded."""

    records: tuple[type[BaseModel], ...]
    """The records whose fields are its options in training."""
    attach: Callable[..., TrainedDefense]
    """Builds it untrained from the model, a record of each kind, and a seed."""
    load: Callable[[Omni, Path, Any], TrainedDefense]
    """Builds it from the model, a folder, and the options at test time."""
    saved_as: str
    """The name under which its folders are saved; defences of one name share them."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Its options in training where they differ from the records' defaults."""


@dataclass(frozen=True)
class DefenseEntry:
    """One defence."""

    name: str
    """As on the command line."""
    settings: type[BaseModel]
    """The record of its options at test time."""
    summary: str
    """What it does, in a line."""
    build: Callable[[Omni, Any], Defense] | None = None
    """Builds it from a model and `settings`; None for a defence that is trained."""
    recipe: DefenseRecipe | None = None
    """How it is trained and loaded; None for a defence without training."""

    @property
    def trains(self) -> bool:
        """True for a defence that has to be trained before it can be loaded."""
        return self.recipe is not None


def _token_recipe(kind: type[SsftToken] | type[RefusalToken]) -> DefenseRecipe:
    """The recipe that both defences with safety tokens but without safety attention share."""

    def attach(omni: Omni, config: SsftTokenSettings, training: TrainSettings, seed: int) -> TrainedDefense:
        return kind.attach(omni, config.casa_config(), training, seed)

    return DefenseRecipe((SsftTokenSettings, TrainSettings), attach, kind.load, "ssft-token")


_ENTRIES = (
    DefenseEntry("none", NoSettings, "the model as it is", lambda omni, _: Undefended(omni)),
    DefenseEntry(
        "safety-prompt", NoSettings, "the safety prompt alone", lambda omni, _: Undefended(omni, safety_prompt=True)
    ),
    # Trained.
    DefenseEntry(
        "ssft",
        NoSettings,
        "fine-tuned to refuse, no token",
        recipe=DefenseRecipe(
            (SsftSettings, TrainSettings), Ssft, lambda omni, path, _: Ssft.from_pretrained(path, omni), "ssft"
        ),
    ),
    DefenseEntry("ssft-token", SafetyTokenSettings, "CASA without safety attention", recipe=_token_recipe(SsftToken)),
    DefenseEntry(
        "refusal-token",
        RefusalTokenSettings,
        "a threshold on the unsafe token's probability",
        recipe=_token_recipe(RefusalToken),
    ),
    DefenseEntry(
        "circuit-breaker",
        NoSettings,
        "representation rerouting",
        recipe=DefenseRecipe(
            (CircuitBreakerSettings,),
            CircuitBreaker,
            lambda omni, path, _: CircuitBreaker.from_pretrained(path, omni),
            "circuit-breaker",
        ),
    ),
    DefenseEntry(
        "casa",
        CasaSettings,
        "safety tokens and safety attention",
        recipe=DefenseRecipe((CasaConfig, TrainSettings), CasaDefense.attach, CasaDefense.load, "casa"),
    ),
    DefenseEntry(
        "casa-mended",
        CasaSettings,
        "CASA with options beyond the paper",
        recipe=DefenseRecipe((CasaConfig, TrainSettings), CasaMended.attach, CasaMended.load, "casa", MENDED),
    ),
    # At decoding time.
    DefenseEntry("coca", CocaSettings, "a safety principle's effect on the logits, made larger", Coca),
    DefenseEntry(
        "safecode", SafeCodeSettings, "contrast with a noised picture, refusals pushed by a verdict", SafeCode
    ),
    DefenseEntry("moras", MorasSettings, "first states steered towards unsafe prototypes, by risk", Moras),
    DefenseEntry("any-depth", AnyDepthSettings, "the header inserted again in the middle of a reply", AnyDepth),
)
DEFENSES: Mapping[str, DefenseEntry] = {entry.name: entry for entry in _ENTRIES}
"""All defences, in the order of the comparison's rows."""


def defense_entry(name: str) -> DefenseEntry:
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
    entry, record = check_defense(name, path, settings)
    if entry.recipe is not None:
        defense: Defense = entry.recipe.load(omni, Path(str(path)), record)
    else:
        assert entry.build is not None
        defense = entry.build(omni, record)
    defense.safety_prompt = defense.safety_prompt or safety_prompt
    return defense


def check_defense(name: str, path: Path | str | None, settings: Mapping[str, Any]) -> tuple[DefenseEntry, Any]:
    """The entry of a defence and `settings` as its record; refuses what `load_defense` can refuse without a model.

    Raises:
        InputError, ModelError: as `load_defense`.
    """
    entry = defense_entry(name)
    record = options(name, (entry.settings,), settings)[0]
    if entry.recipe is None:
        if path is not None:
            raise InputError(f"defense {name!r} is not trained, so there is nothing to load from {path}; leave it out")
    elif path is None:
        raise InputError(
            f"defense {name!r} has to be trained first: casa-mech train --defense {name} --out DIR; "
            "then give DIR as path= (--gate DIR)"
        )
    elif (saved := saved_as(path)) != entry.recipe.saved_as:
        raise ModelError(f"{path} holds the defense {saved!r}, not {name!r}; give the folder of one")
    return entry, record


def training_options(name: str, settings: Mapping[str, Any]) -> list[Any]:
    """`settings` over the preset of the defence `name`, as its records in training.

    Raises:
        InputError: as `options`, or a defence without training.
    """
    recipe = defense_entry(name).recipe
    if recipe is None:
        names = ", ".join(entry.name for entry in DEFENSES.values() if entry.trains)
        raise InputError(f"defense {name!r} needs no training; those that do: {names}")
    return options(name, recipe.records, {**recipe.preset, **settings})


def options(name: str, kinds: Sequence[type[BaseModel]], settings: Mapping[str, Any]) -> list[Any]:
    """`settings` as a record of each of `kinds`, which together are the options of the defence `name`.

    Raises:
        InputError: an unknown option (the known ones are listed), or a value that does not fit.
    """
    known = [field for kind in kinds for field in kind.model_fields]
    unknown = [option for option in settings if option not in known]
    if unknown:
        raise InputError(f"defense {name!r} has no option {unknown[0]!r}; its options: {', '.join(known) or 'none'}")
    fields = [{name: value for name, value in settings.items() if name in kind.model_fields} for kind in kinds]
    return [kind(**values) for kind, values in zip(kinds, fields, strict=True)]
