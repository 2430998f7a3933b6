"""A training run's state in one safetensors file, written whole or not at all; nothing is pickled."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from casa_mech.errors import RunError
from casa_mech.files import writing
from casa_mech.omni.finite import is_finite

FILE = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
"""A line of metrics for each step."""
SCHEMA = 1


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Steps done."""
    best_loss: float = float("inf")
    """The lowest validation loss."""
    bad_rounds: int = 0
    """Validations since then."""
    done: bool = False
    """Nothing is left to do."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights by name at the lowest validation loss, if there was a validation."""


def rng_state() -> dict[str, Tensor]:
    """States of torch's generators, by name."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Set torch's generators to what `rng_state` returned; generators of devices that are not here are passed over."""
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda{index}"], index)


def write_checkpoint(
    folder: Path,
    progress: Progress,
    weights: dict[str, Tensor],
    optimizer: Optimizer,
    rng: dict[str, Tensor],
    run_key: str,
) -> None:
    """Write the run's state; `run_key` says which run it belongs to.

    Raises:
        RunError: the folder cannot be written.
    """
    tensors = {f"weights/{name}": value for name, value in weights.items()}
    tensors |= {f"best/{name}": value for name, value in progress.best.items()}
    tensors |= {f"rng/{name}": value for name, value in rng.items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in entries.items()}
    header = {
        "schema": SCHEMA,
        "run_key": run_key,
        "step": progress.step,
        "best_loss": progress.best_loss,
        "bad_rounds": progress.bad_rounds,
        "done": progress.done,
    }
    with writing(folder / FILE) as path:
        stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(stored, path, metadata={"progress": json.dumps(header)})


def read_checkpoint(
    folder: Path, weights: dict[str, Tensor], optimizer: Optimizer, run_key: str
) -> tuple[Progress, dict[str, Tensor]]:
    """Put the state in `folder` into `weights` and `optimizer`; returns the progress and the generators' states.

    Raises:
        RunError: the file is corrupt, holds NaN, or belongs to a run with other data, settings or model.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it and train again") from None
    if header["run_key"] != run_key:
        raise RunError(f"{path} is of a run with other data, settings or model; give another folder, or remove it")
    broken = next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)
    if broken is not None:
        raise RunError(f"{path}: the tensor {broken} holds NaN or infinite numbers; remove it and train again")
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(tensors[f"weights/{name}"])
    _load_optimizer(optimizer, tensors)
    progress = Progress(
        header["step"], header["best_loss"], header["bad_rounds"], header["done"], _under(tensors, "best/")
    )
    return progress, _under(tensors, "rng/")


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in _under(tensors, "optimizer/").items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_metrics(folder: Path, until: int) -> list[dict[str, float]]:
    """The metrics of steps up to `until`; lines of later steps or half-written ones are left out."""
    path = folder / METRICS
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > until:
            break
        rows.append(row)
    return rows
