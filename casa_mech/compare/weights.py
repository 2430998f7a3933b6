"""Trained defences for a comparison: each trained once, continued after a stop, shared by the rows that use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict

from casa_mech.casa.checkpoint import METRICS
from casa_mech.compare.systems import ComparedSystem, training_records
from casa_mech.defenses.training import WORK, train_defense
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.evaluation.training import Benign, check_benign, world_examples
from casa_mech.files import remove_folder
from casa_mech.identity import examples_digest, folder_sha256, json_digest, key_digest
from casa_mech.omni import Omni
from casa_mech.queries import Example
from casa_mech.queries.files import read_examples
from casa_mech.study.folder import RunFolder
from casa_mech.study.settings import PROFILES

_SIZES = PROFILES["default"]


class ExampleTable(BaseModel):
    """A training set of one's own: a table and its columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    """CSV, JSON, JSONL or parquet."""
    prompt: str = "prompt"
    """Column of prompts."""
    reply: str = "reply"
    """Column of replies: a refusal where the prompt is harmful, an answer where it is benign."""
    label: str = "label"
    """Column of labels, harmful or benign."""
    completion: str | None = None
    """Column of answers to the harmful prompts, which circuit breakers are trained on."""


@dataclass(frozen=True)
class TrainingPlan:
    """How every trained row is trained."""

    n_examples: int = _SIZES.train_examples
    """Number of examples, half of them harmful."""
    settings: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType(
            {"max_steps": _SIZES.train_steps, "batch_size": _SIZES.train_batch, "micro_batch_size": 32}
        )
    )
    """Options that all supervised trainings share."""
    table: ExampleTable | None = None
    """Where the examples come from; None: the micro-world."""
    benign: Benign = "plain"
    """The benign half of the micro-world's examples."""
    drawn: Callable[[int, int], list[Example]] | None = None
    """Examples of another study plan, from their number and the seed."""

    def __post_init__(self) -> None:
        check_benign(self.benign, "benign", own_table=self.table is not None)

    def examples(self, seed: int, n: int | None = None, benign: Benign | None = None) -> list[Example]:
        """The training set, or the first `n` of it with as many of each label; `benign` in the plan's place, if given.

        Raises:
            InputError: a table that cannot be read, or one without both labels.
        """
        kind = check_benign(benign or self.benign, "benign", own_table=self.table is not None)
        if self.drawn is not None:
            return self.drawn(n or self.n_examples, Draw.TRAINING + seed)
        if self.table is None:
            return world_examples(n or self.n_examples, Draw.TRAINING + seed, kind)
        table = self.table
        examples = read_examples(table.path, table.prompt, table.reply, table.label, table.completion).examples
        return list(examples) if n is None else _balanced(examples, n)


class Weights:
    """The trained weights of a comparison, kept in its folder.

    Args:
        plan: how they are trained.
        folder: the comparison's.
        progress: whether to draw bars.
    """

    def __init__(self, plan: TrainingPlan, folder: RunFolder, progress: bool = True) -> None:
        self.plan, self.folder, self.progress = plan, folder, progress
        self._examples: dict[tuple[int, int | None, Benign | None], list[Example]] = {}

    def key(self, system: ComparedSystem, seed: int, omni: Omni) -> dict[str, Any]:
        """All that the weights depend on: the recipe, or the files of a row that has a folder of its own.

        Raises:
            InputError: that folder is not there.
        """
        folder = system.folder(seed)
        if folder is not None:
            if not folder.is_dir():
                raise InputError(f"{system.label}: no folder {folder} with trained weights; check path")
            return {"files": [list(entry) for entry in folder_sha256(folder).items()]}
        recipe = system.entry.recipe
        assert recipe is not None
        _, records = training_records(system, self.plan.settings, seed)
        examples = self._training_set(system, seed)
        completions = [example.query.meta.get("compliance", "") for example in examples]
        return {
            "saved_as": recipe.saved_as,
            "records": [json.loads(record.model_dump_json()) for record in records],
            "examples": examples_digest(examples),
            "completions": json_digest(completions),
            "model": omni.fingerprint(),
            "seed": seed,
        }

    def find(self, system: ComparedSystem, seed: int, omni: Omni) -> Path:
        """The folder of the weights; trained now, on `omni`, if they are not there. The model is left as it was.

        Raises:
            InputError, RunError: as `train_defense`.
        """
        folder = system.folder(seed)
        if folder is not None:
            return folder
        key = self.key(system, seed, omni)

        def build(new: Path) -> None:
            work = self.folder.path("training", key_digest(key))
            if work.exists() and not (work / WORK).is_dir():
                remove_folder(work)  # killed between its end and the copy
            settings, _ = training_records(system, self.plan.settings, seed)
            trained = train_defense(
                system.defense, omni, self._training_set(system, seed), work, progress=self.progress, **settings
            )
            trained.close()
            shutil.copytree(work, new, dirs_exist_ok=True)
            remove_folder(work)

        return self.folder.artifact("trained", key_digest(key), key, build)

    def _training_set(self, system: ComparedSystem, seed: int) -> list[Example]:
        key = seed, system.examples, system.benign
        if key not in self._examples:
            self._examples[key] = self.plan.examples(*key)
        return self._examples[key]


def training_cost(folder: Path) -> tuple[float, int]:
    """(seconds, steps) of a training, from its log: the sum over steps, so that a stop does not count. (NaN, 0) for a
    folder without a log."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        seconds = [float(json.loads(line)["seconds"]) for line in lines]
    except (OSError, ValueError, KeyError):
        return float("nan"), 0
    return sum(seconds), len(seconds)


def _balanced(examples: Sequence[Example], n: int) -> list[Example]:
    half = n // 2
    of_class = {
        label: [example for example in examples if example.query.label == label] for label in ("harmful", "benign")
    }
    few = next((label for label, members in of_class.items() if len(members) < half), None)
    if few is not None:
        raise InputError(f"examples={n} needs {half} {few} examples; the training set has {len(of_class[few])}")
    first = {id(example) for members in of_class.values() for example in members[:half]}
    return [example for example in examples if id(example) in first]
