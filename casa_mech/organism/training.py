"""The training loop of every stage, and its checkpoint: a training that was stopped goes on exactly where it stood."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

from casa_mech.errors import RunError
from casa_mech.files import writing
from casa_mech.identity import digest_of
from casa_mech.omni import Omni

SCHEMA = 1
GROUP = 4
"""Batches that are drawn at a time; a checkpoint falls between two groups, where no drawn row is waiting."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A run of optimiser steps: AdamW over one cycle of the learning rate."""

    name: str
    """Shown beside the progress bar."""
    trains: tuple[str, ...]
    """Parts that learn: "language", "image", "audio"."""
    steps: int
    learning_rate: float
    """The highest of the cycle."""
    batch_size: int = 48
    warm_up: float = 0.1
    """Share of the steps in which the learning rate rises."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay of the first and second moment."""


class Checkpoint:
    """Weights, optimiser, schedule and generators of a training in stages, kept in one file.

    A training calls `restore` once, leaves out the stages before `stage`, and calls `finish_stage` after each of the
    others. Killed at any moment and started again, it ends with the same weights, bit for bit.
    """

    def __init__(self, path: Path, stage_keys: Sequence[str], every: int = 100) -> None:
        """A checkpoint in `path`.

        Args:
            path: the file; whole or not there.
            stage_keys: for each count of stages, from none to all, what the training through that many depends on. A
                file of other stages is refused; what comes after them may differ.
            every: steps between writes, rounded up to a multiple of `GROUP`.
        """
        self.stage = 0
        """Index of the stage to go on with; those before it are done."""
        self._path = path
        self._keys = [digest_of(key) for key in stage_keys]
        self._every = -(-every // GROUP) * GROUP
        self._step = 0
        self._header: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._seconds_before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training until now; of a stopped run those up to its last write."""
        return self._seconds_before + time.perf_counter() - self._began

    def restore(self, model: nn.Module) -> None:
        """Put the saved weights and torch's generators in place; nothing happens where nothing was saved.

        Raises:
            RunError: the file cannot be read, or belongs to another training.
        """
        if not self._path.exists():
            return
        try:
            with safe_open(self._path, framework="pt") as file:
                self._header = json.loads(file.metadata()["progress"])
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise RunError(f"{self._path} cannot be read ({error}); remove it and build again") from None
        if self._header["schema"] != SCHEMA or self._header["key"] != self._key(self._header):
            raise RunError(f"{self._path} is of a build with other options; choose another --out, or remove it")
        model.load_state_dict(_under("model", self._tensors))
        torch.set_rng_state(self._tensors["torch/cpu"])
        if torch.cuda.is_available() and "torch/cuda" in self._tensors:
            torch.cuda.set_rng_state(self._tensors["torch/cuda"])
        self.stage, self._step = self._header["stage"], self._header["step"]
        self._seconds_before = self._header["seconds"]

    def begin(self, optimizer: Optimizer, schedule: LRScheduler, rng: np.random.Generator) -> int:
        """Steps of the present stage that are done; optimiser, schedule and `rng` are set to where they stood then."""
        step, self._step = self._step, 0
        if step:
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _under("optimizer", self._tensors).items():
                index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": self._header["groups"]})
            schedule.load_state_dict(self._header["schedule"])
            rng.bit_generator.state = self._header["generator"]
        self._header, self._tensors = {}, {}
        return step

    def update(
        self, step: int, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, rng: np.random.Generator
    ) -> None:
        """Write the state after `step` steps of the present stage, if it is time to.

        Raises:
            RunError: the folder cannot be written.
        """
        if step % self._every:
            return
        state = optimizer.state_dict()
        tensors = {f"optimizer/{i}/{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
        header = {
            "groups": state["param_groups"],
            "schedule": schedule.state_dict(),
            "generator": rng.bit_generator.state,
        }
        self._write(step, model, tensors, header)

    def finish_stage(self, model: nn.Module) -> None:
        """Write the state between two stages.

        Raises:
            RunError: the folder cannot be written.
        """
        self.stage += 1
        self._write(0, model, {}, {})

    def _key(self, header: Mapping[str, Any]) -> str | None:
        """The key of the stages that the header's state went through; None where there are fewer."""
        begun = header["stage"] + bool(header["step"])
        return self._keys[begun] if begun < len(self._keys) else None

    def _write(self, step: int, model: nn.Module, tensors: dict[str, Tensor], header: Mapping[str, Any]) -> None:
        tensors |= {f"model/{name}": value for name, value in model.state_dict().items()}
        tensors["torch/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["torch/cuda"] = torch.cuda.get_rng_state()
        progress = {
            "schema": SCHEMA,
            "stage": self.stage,
            "step": step,
            "seconds": self.seconds,
            **header,
        }
        progress["key"] = self._key(progress)
        with writing(self._path) as temporary:
            stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
            save_file(stored, temporary, metadata={"progress": json.dumps(progress)})


def optimise(
    omni: Omni,
    steps: Steps,
    losses_from: Callable[[int], Iterator[tuple[Tensor, Mapping[str, float]]]],
    rng: np.random.Generator,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the parts that `steps` names, in place; returns the loss of each step (after a stop, of those that were
    left).

    Args:
        omni: the model; all but the named parts is frozen.
        steps: how long and how fast.
        losses_from: given the number of steps already done, yields each step's loss and what the bar shows beside it.
        rng: the generator that the losses draw from.
        progress: whether to draw a bar.
        checkpoint: where the state is kept.
    """
    omni.model.requires_grad_(False).train()
    learning = [parameter for part in steps.trains for parameter in parameters_of(omni, part)]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning, lr=steps.learning_rate, weight_decay=0.01, betas=steps.betas)
    schedule = OneCycleLR(optimizer, steps.learning_rate, total_steps=steps.steps, pct_start=steps.warm_up)
    first = checkpoint.begin(optimizer, schedule, rng) if checkpoint else 0
    losses: list[float] = []
    with tqdm(total=steps.steps, initial=first, desc=steps.name, unit="step", disable=not progress) as bar:
        for step, (loss, shown) in enumerate(losses_from(first), start=first + 1):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix({"loss": f"{np.mean(losses[-20:]):.3f}"} | {k: f"{v:.2f}" for k, v in shown.items()})
            if checkpoint:
                checkpoint.update(step, omni.model, optimizer, schedule, rng)
    return losses


def parameters_of(omni: Omni, part: str) -> Iterator[nn.Parameter]:
    """The parameters of a part: "language" (embeddings, blocks and head) or the tower "image" or "audio"."""
    if part == "language":
        yield from omni.text_model.parameters()
        yield from omni.head.parameters()
    else:
        yield from omni.tower(part).parameters()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
