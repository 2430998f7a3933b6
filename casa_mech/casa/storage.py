"""A gate on disk: peft adapter, safety attention, token rows, config and model card; written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from casa_mech.casa.adapter import WEIGHTS as ADAPTER_WEIGHTS
from casa_mech.casa.config import OLD_NAMES, CasaConfig, InferenceSettings, LoraSettings, TrainSettings
from casa_mech.casa.trainer import Row
from casa_mech.errors import ModelError, reason_of
from casa_mech.identity import file_sha256
from casa_mech.omni import Omni
from casa_mech.omni.finite import check_weights
from casa_mech.queries import Example

SCHEMA = 1
CONFIG, ATTENTION, ROWS, CALIBRATION, CARD = (
    "casa_config.json",
    "safety_attention.safetensors",
    "token_rows.safetensors",
    "calibration.safetensors",
    "README.md",
)


class Base(BaseModel):
    """The model that a gate was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Where it was loaded from."""
    fingerprint: str
    """Digest of its weights (`Omni.fingerprint`)."""
    d_model: int
    """Width of its residual stream."""
    n_layers: int
    """Number of its blocks."""
    tied: bool
    """Embedding and head are one matrix."""

    @classmethod
    def of(cls, omni: Omni) -> Base:
        """The facts about `omni` that a gate depends on."""
        return cls(
            source=omni.source,
            fingerprint=omni.fingerprint(),
            d_model=omni.d_model,
            n_layers=omni.n_layers,
            tied=omni.tied,
        )


class TrainingRecord(BaseModel):
    """How a gate, or another trained defence, was trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: TrainSettings
    """Of the run."""
    n_harmful: int
    """Number of harmful examples."""
    n_benign: int
    """Number of benign examples."""
    steps: int
    """Optimiser steps taken."""
    metrics: dict[str, float]
    """Metrics at the step whose weights were saved."""

    @classmethod
    def of(cls, examples: Sequence[Example], settings: TrainSettings, log: Sequence[Row]) -> TrainingRecord:
        """The record of a run over `examples` that left the rows `log`."""
        harmful = sum(example.query.label == "harmful" for example in examples)
        # The weights are those of the best validation, so the metrics must be, too.
        validated = [row for row in log if "validation_loss" in row]
        best = min(validated, key=lambda row: row["validation_loss"]) if validated else log[-1]
        return cls(
            settings=settings,
            n_harmful=harmful,
            n_benign=len(examples) - harmful,
            steps=len(log),
            metrics={key: value for key, value in best.items() if key != "seconds"},
        )


class Stored(BaseModel):
    """The content of `casa_config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA
    """Version of this format."""
    config: CasaConfig
    """The method's options."""
    base: Base
    """The model it was trained on."""
    training: TrainingRecord | None = None
    """How it was trained; None for a gate that was not."""
    calibration: dict[str, dict[str, int]] | None = None
    """Number of its calibration prompts by purpose and surface; None for a gate without a calibration."""
    files: dict[str, str] | None = None
    """SHA-256 of its files of weights by name; None for a gate of an earlier release."""


def read_stored(directory: Path) -> Stored:
    """The gate's description in `directory`.

    Raises:
        ModelError: no gate there, or its description is corrupt or of another schema version.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ModelError(f"{directory} has no {CONFIG}: it holds no gate; give the folder that casa-mech train wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.get("schema_version")
        if version != SCHEMA:
            raise ModelError(f"{path} has schema version {version}; this release of casa-mech reads {SCHEMA}")
        return Stored.model_validate({**raw, "config": _renamed(raw["config"])})
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt ({reason_of(error)}); train the gate again") from None


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the forms and rules of earlier releases by their present names."""
    return config | {name: old.get(config[name], config[name]) for name, old in OLD_NAMES.items() if name in config}


def check_base(trained: Base, base: Base, directory: Path) -> str | None:
    """A warning when the gate in `directory` was `trained` on other weights of `base`'s shape, else None.

    Raises:
        ModelError: the shapes differ.
    """
    for field in ("d_model", "n_layers", "tied"):
        theirs, ours = getattr(trained, field), getattr(base, field)
        if theirs != ours:
            raise ModelError(
                f"{directory} was trained on {trained.source} with {field} {theirs}, and does not fit {base.source} "
                f"with {field} {ours}; load it on {trained.source}"
            )
    if trained.fingerprint != base.fingerprint:
        return (
            f"{directory} was trained on {trained.source}, not on these weights of {base.source}: the gate may not hold"
        )
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file.

    Raises:
        ModelError: the file is missing or truncated, or a tensor is not finite; the message names it.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing or corrupt ({error}); save the gate again") from None
    check_weights(tensors, path, "train it again")
    return tensors


def fill(module: nn.Module, path: Path) -> None:
    """Load a module's state from `path`.

    Raises:
        ModelError: the file is missing, truncated, not finite, or of another shape.
    """
    try:
        module.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{path} does not fit its own {CONFIG} or this model: {line}") from None


def dump(module: nn.Module, path: Path) -> None:
    """Write a module's state as safetensors."""
    write_tensors(module.state_dict(), path)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as safetensors."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def weight_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file in `folder`, by its name."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def check_files(directory: Path, files: Mapping[str, str] | None) -> None:
    """Refuse weights that are not those which were saved with the description beside them.

    Raises:
        ModelError: a file has another digest than `files` says; it is named.
    """
    digests = weight_digests(directory) if files else {}
    changed = next((name for name, digest in (files or {}).items() if digests.get(name) != digest), None)
    if changed is not None:
        raise ModelError(
            f"{directory / changed} is not the file that was saved with this gate: copy the whole folder again, or "
            "train it again"
        )


def share_files(folder: Path) -> None:
    """Let others read the files of `folder` as far as they may read its card.

    safetensors makes its files readable by their owner alone; what was trained is there to be shared.
    """
    for file in folder.iterdir():
        file.chmod((folder / CARD).stat().st_mode)


def model_card(stored: Stored) -> str:
    """The README of a gate's folder, from the numbers of its run."""
    config, base = stored.config, stored.base
    attends = config.form != "none"
    lines = [
        f"# {'CASA gate' if attends else 'Safety tokens'} for {base.source}",
        "",
        "A safety gate after CASA (arXiv 2604.00310), trained with casa-mech: before the first word the model chooses",
        f"between `{config.safe_token}` and `{config.unsafe_token}`, "
        f"{'guided by safety attention over the prompt' if attends else 'without safety attention'}.",
        "",
        f"Load it with `Casa.from_pretrained(directory, load_omni({base.source!r}))`. `{ADAPTER_WEIGHTS}` is a",
        f"plain peft adapter; {f'`{ATTENTION}` holds safety attention, ' if attends else ''}`{ROWS}` the tokens' rows.",
        "",
        *base_lines(base),
    ]
    if attends:
        lines += [
            f"| safety attention | {config.form}, queries from {config.query_source} |",
            f"| reads | layer {config.layer}, {config.positions} |",
            f"| logit rule | {config.rule}{f', at inference {rule}' if (rule := config.inference_rule) else ''} |",
        ]
    lines += [
        lora_line(config),
        f"| objective | beta {config.beta}, lambda {config.lambda_tok}, softmax {config.ce_support} |",
    ]
    if config.counterfactual:
        lines.append(f"| counterfactual examples | beside {config.counterfactual:.0%} of the benign ones |")
    plain = InferenceSettings(inference_rule=config.inference_rule).model_dump()
    changed = [f"{name} {value}" for name, value in config.inference if value != plain[name]]
    if changed:
        lines.append(f"| beyond the paper | {', '.join(changed)} |")
    for purpose, sizes in (stored.calibration or {}).items():
        if sizes:
            lines.append(f"| {purpose} calibration prompts | {', '.join(f'{n} {name}' for name, n in sizes.items())} |")
    return "\n".join([*lines, *training_lines(stored.training), ""])


def base_lines(base: Base) -> list[str]:
    """The head and first rows of a card's table: the model."""
    return [
        "| | |",
        "|---|---|",
        f"| base | {base.source}, d_model {base.d_model}, {base.n_layers} blocks |",
        f"| base's fingerprint | `{base.fingerprint}` |",
    ]


def lora_line(config: LoraSettings) -> str:
    """A row of a card's table: the adapter."""
    return f"| LoRA | r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout} |"


def training_lines(training: TrainingRecord | None) -> list[str]:
    """The last rows of a card's table, and its metrics."""
    if training is None:
        return ["", "Not trained."]
    return [
        f"| examples | {training.n_harmful} harmful, {training.n_benign} benign, text only |",
        f"| steps | {training.steps} of {training.settings.batch_size}, seed {training.settings.seed} |",
        "",
        "## Metrics of the saved weights",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in sorted(training.metrics.items())),
    ]
