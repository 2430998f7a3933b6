"""A comparison's queries from a YAML file: public sets by name, an attack on each, the judge, and the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from casa_mech.attacks import PROMPT_SLOTS, attack_named
from casa_mech.compare.systems import SEEDS, ComparedSystem, system_named
from casa_mech.compare.weights import ExampleTable
from casa_mech.errors import InputError, reason_of
from casa_mech.evaluation.training import Benign
from casa_mech.judging.registry import BACKENDS, JUDGES
from casa_mech.limits import GREATEST_SEED
from casa_mech.omni import GenerationSettings
from casa_mech.queries import BENCHMARKS
from casa_mech.queries.benchmarks import benchmark_named
from casa_mech.queries.benchmarks.read import TABLE, MissingMedia
from casa_mech.queries.files import QuerySource

EXAMPLE = "paper_table.yaml"
AS_IT_IS = "none"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QuerySection(_Section):
    """Where the queries of one label come from (see `casa_mech.queries.read_queries`)."""

    set: str
    """A public set by name, or `table`."""
    path: Path | None = None
    """Its file or folder; None: where public sets are found."""
    split: str | None = None
    """One of its splits; None for its own choice."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many, drawn by the seed."""
    missing_media: MissingMedia = "error"
    """What becomes of a row whose picture or clip is not there."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of a table, by the names of the fields of `QuerySource`."""
    meta: dict[str, str] = Field(default_factory=dict)
    """For a table, what attacks read of a query: `Query.meta` key -> column (key_phrase, compliance, ...)."""

    @field_validator("set")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != TABLE:
            benchmark_named(name)
        return name

    @model_validator(mode="after")
    def _holds(self) -> Self:
        if self.set != TABLE:
            BENCHMARKS[self.set].check_split(self.split)
        if self.set != TABLE and (self.columns or self.meta):
            raise InputError(f"columns and meta are for the set '{TABLE}'; {self.set} has columns of its own")
        return self


class SetSection(_Section):
    """One column of the table: a set under an attack, and the benign queries that get the same attack."""

    name: str
    """Of the column."""
    harmful: QuerySection | None = None
    """Queries that should be refused."""
    benign: QuerySection | None = None
    """Queries that should be answered; as many as the harmful ones get the same draws, pair by pair."""
    attack: str = AS_IT_IS
    """The attack by name; `none` leaves the queries as they are."""
    wrappers: Literal["seen", "held_out", "all"] = "held_out"
    """Of the attack jailbreak."""
    picture: Path | None = None
    """Of the attack sd-typo."""
    prompt_file: Path | None = None
    """Of the attacks of FigStep and AIAH: the published wording of their text (see `attacks.prompt_file`); None: our
    own."""
    skip_unfit: bool = False
    """Leave out what the attack cannot be used on, instead of stopping there."""

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


class JudgeSection(_Section):
    """The judge, as for `load_judge`."""

    name: str = "keyword"
    """A judge by name, or a rubric's .json file."""
    backend: Literal["local", "openai", "anthropic"] = BACKENDS[0]
    """Where a rubric's judging model is."""
    model: str = ""
    """The judging model."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options: base_url, key_env, threshold, ..."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in JUDGES and not name.endswith(".json"):
            raise InputError(f"unknown judge {name!r}; judges: {', '.join(JUDGES)}, or a rubric's .json file")
        return name


class TrainingSection(_Section):
    """How trained rows are trained."""

    examples: ExampleTable | None = None
    """On what; None: the micro-world's examples."""
    benign: Benign = "plain"
    """The benign half of the micro-world's examples."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that all supervised trainings share."""


class CompareConfig(_Section):
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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or type(error).__name__}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = reason_of(error) if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"{path} is no YAML: {reason}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected keys and values; casa-mech compare --example prints a whole file")
    try:
        return CompareConfig.model_validate(_placed(content, path.parent))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(step) for step in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = ", ".join(_fields_at(first["loc"][:-1]))
            message = f"no such key{f'; there are {known}' if known else ''}"
        raise InputError(f"{path}: {key}: {message}") from None


def example() -> str:
    """The shipped example: the table of CASA's paper."""
    return (files("casa_mech.compare") / EXAMPLE).read_text(encoding="utf-8")


_PATHS = ("data", "path", "picture", "prompt_file", "casa")


def _placed(value: Any, folder: Path, key: object = "") -> Any:
    """`value` with every relative path below `folder`."""
    if isinstance(value, Mapping):
        return {name: _placed(entry, folder, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_placed(entry, folder, key) for entry in value]
    if key in _PATHS and isinstance(value, str):
        return str(folder / Path(value).expanduser())
    return value


def _fields_at(steps: Sequence[int | str]) -> list[str]:
    """The keys of the record at a place in the file."""
    kinds: dict[str, type[BaseModel]] = {
        "sets": SetSection, "defenses": ComparedSystem, "judge": JudgeSection, "generation": GenerationSettings,
        "training": TrainingSection, "examples": ExampleTable, "harmful": QuerySection, "benign": QuerySection,
        "tuning": QuerySource,
    }  # fmt: skip
    names = [step for step in steps if isinstance(step, str)]
    kind: type[BaseModel] | None = kinds.get(names[-1]) if names else CompareConfig
    return list(kind.model_fields) if kind is not None else []
