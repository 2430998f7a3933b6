"""Trained defences: training with resume, a folder on disk and, for most of them, a LoRA and nothing else."""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict

from casa_mech.casa.adapter import WEIGHTS, Adapter
from casa_mech.casa.config import LoraSettings, TrainSettings
from casa_mech.casa.storage import (
    CARD,
    SCHEMA,
    Base,
    TrainingRecord,
    base_lines,
    check_base,
    check_files,
    lora_line,
    read_stored,
    read_tensors,
    share_files,
    training_lines,
    weight_digests,
)
from casa_mech.casa.storage import CONFIG as GATE
from casa_mech.casa.trainer import Learner, Row, Trainer, settled
from casa_mech.defenses.base import Defense
from casa_mech.errors import ModelError, reason_of
from casa_mech.files import writing_folder
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Example, Query, Reply

FILE = "defense.json"


class TrainedDefense(Defense):
    """A defence that has to be trained: `attach`, then `train`, then `save_pretrained`."""

    @abstractmethod
    def train(
        self, examples: Sequence[Example], out: Path | None = None, resume: bool = False, progress: bool = True
    ) -> list[Row]:
        """Train on text; a row of metrics for each step (see `Casa.train`, whose arguments these are)."""

    @abstractmethod
    def save_pretrained(self, directory: Path | str) -> None:
        """Write all that `load_defense` needs into `directory`, with a card, whole or not at all."""


class Saved(BaseModel):
    """The content of `defense.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA
    """Version of this format."""
    defense: str
    """The defence whose LoRA it is."""
    config: dict[str, Any]
    """Of the LoRA and of its objective."""
    base: Base
    """The model it was trained on."""
    training: TrainingRecord | None = None
    """How it was trained; None for one that was not."""
    failed: str = ""
    """In what its training missed its own criterion; empty where it met it or has none."""
    files: dict[str, str] | None = None
    """SHA-256 of its files of weights by name; None for one of an earlier release."""


class Tuned(TrainedDefense):
    """A LoRA and nothing else. Subclasses say what it is trained for; generation is the model's own.

    Args:
        omni: the model, which carries the LoRA until `close`.
        config: of the LoRA and of its objective.
        seed: of the LoRA's start.
    """

    config_type: ClassVar[type[LoraSettings]]
    """The record of its options in training."""
    about: ClassVar[str]
    """A sentence for the card: what it is and where it is from."""

    def __init__(self, omni: Omni, config: LoraSettings, seed: int = 0) -> None:
        super().__init__(omni)
        self.config = config
        self.training: TrainingRecord | None = None
        self.failed = ""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.adapter: Adapter | None = Adapter(omni, config, self._layers())

    def train(
        self, examples: Sequence[Example], out: Path | None = None, resume: bool = False, progress: bool = True
    ) -> list[Row]:
        """Train on text; a row of metrics for each step (see `Casa.train`, whose arguments these are).

        Raises:
            InputError: examples that cannot be used. RunError: as `Casa.train`.
        """
        settings = self._loop()
        log = Trainer(self._learner(examples), settings, out).run(resume, progress)
        self.training = TrainingRecord.of(examples, settled(settings, self.omni), log)
        self.failed = self._failure(log)
        return log

    def save_pretrained(self, directory: Path | str) -> None:
        """Write the adapter, its record and a card into `directory`, whole or not at all.

        Raises:
            RunError: the place cannot be written.
        """
        config = self.config.model_dump(mode="json")
        saved = Saved(
            defense=self.name, config=config, base=Base.of(self.omni), training=self.training, failed=self.failed
        )
        with writing_folder(directory) as folder:
            self._attached.save(folder)
            saved = saved.model_copy(update={"files": weight_digests(folder)})
            (folder / FILE).write_text(saved.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (folder / CARD).write_text(self._card(saved), encoding="utf-8")
            share_files(folder)

    @classmethod
    def from_pretrained(cls, directory: Path | str, omni: Omni) -> Self:
        """A saved defence on `omni`; warns when it was trained on other weights of the same shape.

        Raises:
            ModelError: files are missing, truncated or of another schema, or do not fit the model.
        """
        directory = Path(directory)
        saved = read_saved(directory)
        warning = check_base(saved.base, Base.of(omni), directory)
        lora = read_tensors(directory / WEIGHTS)
        defense = cls(omni, cls.config_type(**saved.config))
        try:
            defense._attached.load(lora, directory / WEIGHTS)
            check_files(directory, saved.files)
        except ModelError:
            defense.close()
            raise
        defense.training, defense.failed = saved.training, saved.failed
        if warning:
            warnings.warn(warning, stacklevel=2)
        return defense

    def close(self) -> None:
        """Take the LoRA off; the model is the base again."""
        if self.adapter is not None:
            self.adapter.remove()
            self.adapter = None

    @contextmanager
    def disabled(self) -> Iterator[Omni]:
        """The base model, without the LoRA, for the length of a block."""
        self._attached.enable(False)
        try:
            yield self.omni
        finally:
            self._attached.enable(True)

    @property
    def trained_parameters(self) -> int:
        """How many numbers training sets."""
        return sum(value.numel() for value in self._attached.parameters().values())

    @property
    def _attached(self) -> Adapter:
        if self.adapter is None:
            raise ModelError(f"the defense {self.name!r} is closed; load it again")
        return self.adapter

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        with self._attached.merged():
            return self.omni.generate(queries, settings, progress)

    def _failure(self, log: Sequence[Row]) -> str:
        """In what a training that left the rows `log` missed its own criterion."""
        return ""

    def _layers(self) -> Sequence[int] | None:
        """The blocks that get a LoRA; None for all."""
        return None

    @abstractmethod
    def _learner(self, examples: Sequence[Example]) -> Learner: ...

    @abstractmethod
    def _loop(self) -> TrainSettings: ...

    def _card(self, saved: Saved) -> str:
        lines = [
            f"# {saved.defense} for {saved.base.source}",
            "",
            self.about,
            "",
            f"Load it with `load_defense({saved.defense!r}, load_omni({saved.base.source!r}), path=directory)`;",
            f"`{WEIGHTS}` is a plain peft adapter.",
            "",
            *base_lines(saved.base),
            lora_line(self.config),
        ]
        objective = [name for name in saved.config if name not in LoraSettings.model_fields]
        lines += [f"| {name} | {saved.config[name]} |" for name in objective]
        if saved.failed:
            lines.append(f"| **failed** | {saved.failed} |")
        return "\n".join([*lines, *training_lines(saved.training), ""])


def read_saved(directory: Path) -> Saved:
    """The record in `directory`.

    Raises:
        ModelError: there is none, or it is corrupt or of another schema version.
    """
    path = directory / FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("schema_version") != SCHEMA:
            version = raw.get("schema_version")
            raise ModelError(f"{path} has schema version {version}; this release of casa-mech reads {SCHEMA}")
        return Saved.model_validate(raw)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is missing or corrupt ({reason_of(error)}); train it again") from None


def saved_as(directory: Path | str) -> str:
    """The name of the trained defence in `directory`.

    Raises:
        ModelError: it holds none, or a corrupt one.
    """
    directory = Path(directory)
    if (directory / FILE).is_file():
        return read_saved(directory).defense
    if (directory / GATE).is_file():
        return "ssft-token" if read_stored(directory).config.form == "none" else "casa"
    raise ModelError(f"{directory} holds no gate or other trained defense ({GATE}, {FILE}); give what training wrote")
