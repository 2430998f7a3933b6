"""The training loop: AdamW, metrics, validation, checkpoints; what is trained is a `Learner` (docs/method.md §1.5)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from casa_mech.casa.checkpoint import (
    FILE,
    METRICS,
    Progress,
    read_checkpoint,
    read_metrics,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from casa_mech.casa.config import TrainSettings
from casa_mech.errors import RunError
from casa_mech.files import storage_error, write_text
from casa_mech.identity import digest_of
from casa_mech.locks import locked
from casa_mech.omni import Omni
from casa_mech.omni.memory import free_memory, is_out_of_memory, recomputed_blocks, say_halved
from casa_mech.omni.precision import bfloat16_products, fast_bfloat16

Row = dict[str, float]
"""Metrics by name."""
SHOWN = ("loss", "v_harmful", "v_benign", "reroute", "retain")
"""Metrics beside the progress bar, where a method has them."""


class Learner(Protocol):
    """The parameters and losses of a run."""

    @property
    def omni(self) -> Omni:
        """The model."""

    @property
    def steps(self) -> int:
        """Number of steps."""

    @property
    def validates(self) -> bool:
        """True where there is a validation set."""

    @property
    def key(self) -> Sequence[str]:
        """All that determines the run, beside the model."""

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Trainable parameters by name, in the two groups that have a learning rate each."""

    def rate(self, step: int) -> float:
        """Factor of the learning rates at `step`, from 0."""

    def losses(self, step: int) -> Iterator[tuple[Tensor, Row]]:
        """The losses of `step`, one after the other, whose gradients add up; each with its metrics' sums."""

    def validation(self) -> list[Row]:
        """The metrics' sums on the validation set."""

    def summarise(self, sums: Sequence[Row]) -> Row:
        """Metrics, `loss` among them, from their sums."""

    def halve(self) -> str:
        """Take half as much a forward from now on, since it did not fit into memory; what that is, or "" for an example
        alone, which cannot be halved."""

    def finished(self, log: Sequence[Row]) -> bool:
        """True where training may end before `steps`, told by the metrics of the steps done."""


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first `warmup` share of `total` steps, then half a cosine to zero; `step` counts from 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def settled(settings: TrainSettings, omni: Omni) -> TrainSettings:
    """`settings` with the `precision` that "auto" means for `omni` on this machine."""
    if settings.precision != "auto":
        return settings
    fast = omni.device.type == "cpu" and omni.dtype == torch.float32 and fast_bfloat16(omni.device)
    return settings.model_copy(update={"precision": "bfloat16" if fast else "full"})


class Trainer:
    """One run. `log` holds a row of metrics for each step done; with `out` the run can be interrupted and resumed."""

    def __init__(self, learner: Learner, settings: TrainSettings, out: Path | None) -> None:
        self._learner, self._settings, self._out = learner, settings, out
        slow, fast = learner.groups()
        self._weights: dict[str, nn.Parameter] = slow | fast
        self._rates = settings.learning_rates(learner.omni.d_model)
        self._optimizer = torch.optim.AdamW(
            [{"params": list(slow.values())}, {"params": list(fast.values())}], weight_decay=settings.weight_decay
        )
        self._progress = Progress()
        self._rng: dict[str, Tensor] = {}
        self.log: list[Row] = []
        self._run_key = digest_of(repr([*learner.key, learner.omni.fingerprint()]))

    def run(self, resume: bool, progress: bool) -> list[Row]:
        """Train to the end, or from where the checkpoint in `out` stands; the model gets the best validated weights.

        Raises:
            RunError: `out` holds a run already and `resume` is off, or another one, another process trains in it, or it
                cannot be written; or the loss is not finite (the last checkpoint stays).
        """
        omni, model = self._learner.omni, self._learner.omni.model
        halved = settled(self._settings, omni).precision == "bfloat16"
        with (
            locked(self._out) if self._out is not None else nullcontext(),
            torch.random.fork_rng(),
            bfloat16_products(omni) if halved else nullcontext(),
            recomputed_blocks(model) if self._settings.gradient_checkpointing else nullcontext(),
        ):
            torch.manual_seed(self._settings.seed)
            self._begin(resume)
            model.train()
            try:
                self._loop(progress)
            finally:
                model.eval()
                model.zero_grad(set_to_none=True)
        self._restore_best()
        return self.log

    def _begin(self, resume: bool) -> None:
        if self._out is None:
            return
        if (self._out / FILE).is_file():
            if not resume:
                raise RunError(f"{self._out} holds a training run already; resume it, or give another folder")
            self._progress, rng = read_checkpoint(self._out, dict(self._weights), self._optimizer, self._run_key)
            set_rng_state(rng)
            self.log = read_metrics(self._out, self._progress.step)
        lines = "".join(json.dumps(row) + "\n" for row in self.log)
        write_text(self._out / METRICS, lines)

    def _loop(self, show: bool) -> None:
        metrics = (self._out / METRICS).open("a", encoding="utf-8") if self._out else None
        bar = tqdm(total=self._learner.steps, initial=self._progress.step, disable=not show, desc="train", unit="step")
        self._rng, updating = rng_state(), False
        try:
            while not self._progress.done and self._progress.step < self._learner.steps:
                began = time.perf_counter()
                sums = self._gradients()
                updating = True
                row = self._update(sums)
                self._record(row, began, metrics)
                self._rng, updating = rng_state(), False
                if self._progress.step % self._settings.checkpoint_every == 0:
                    self._checkpoint()
                bar.update()
                bar.set_postfix({key: f"{row[key]:.3f}" for key in SHOWN if key in row})
            self._progress.done = True
            self._checkpoint()
        except KeyboardInterrupt:
            # Half-way through an update the weights are of no step; then the last regular checkpoint has to do.
            if not updating:
                self._checkpoint()
            raise
        finally:
            bar.close()
            if metrics:
                with suppress(OSError):  # of a full disk, whose error is on its way already
                    metrics.close()

    def _gradients(self) -> list[Row]:
        """Gradients of one step, in parts that fit in memory."""

        def attempt() -> list[Row]:
            self._optimizer.zero_grad(set_to_none=True)
            sums = []
            for loss, row in self._learner.losses(self._progress.step):
                loss.backward()
                sums.append(row)
            return sums

        return self._fitting(attempt)

    def _fitting(self, attempt: Callable[[], list[Row]]) -> list[Row]:
        """The result of `attempt`, which is made again with half as much a forward as long as memory does not suffice.

        Raises:
            RunError: it does not for a single example.
        """
        before = rng_state()
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Here, since the error's traceback held the attempt's tensors.
            self._optimizer.zero_grad(set_to_none=True)
            free_memory()
            smaller = self._learner.halve()
            if not smaller:
                raise RunError(
                    "out of memory with one example a forward: set gradient_checkpointing, lower max_reply_tokens, or "
                    "train in bfloat16 (--dtype bfloat16)"
                )
            say_halved(smaller)
            set_rng_state(before)

    def _update(self, sums: list[Row]) -> Row:
        """One optimiser step; returns its metrics."""
        factor = self._learner.rate(self._progress.step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        row = self._learner.summarise(sums)
        step = self._progress.step + 1
        self._check_finite("the loss", row["loss"], step)
        norm = float(nn.utils.clip_grad_norm_(self._weights.values(), self._settings.grad_clip))
        self._check_finite("the gradient's norm", norm, step)
        self._optimizer.step()
        return row | {"lr": self._rates[0] * factor, "grad_norm": norm}

    def _check_finite(self, what: str, value: float, step: int) -> None:
        """Stop before weights that are not finite are stepped to, picked as the best or written down.

        Raises:
            RunError: `value` is NaN or infinite.
        """
        if not math.isfinite(value):
            checkpoint = self._out / FILE if self._out is not None else None
            last = f", {checkpoint} holds the last checkpoint" if checkpoint and checkpoint.is_file() else ""
            raise RunError(
                f"{what} is {value} at step {step}: training stopped{last}; lower the learning rate, or check the data"
            )

    def _record(self, row: Row, began: float, metrics: IO[str] | None) -> None:
        """Count the step, validate when it is time, and write the metrics down."""
        self._progress.step += 1
        step = self._progress.step
        if self._learner.validates and (step % self._settings.validate_every == 0 or step == self._learner.steps):
            row |= {f"validation_{key}": value for key, value in self._validate().items()}
            self._check_finite("the validation loss", row["validation_loss"], step)
            self._judge(row["validation_loss"])
        row |= {"step": step, "seconds": time.perf_counter() - began}
        self.log.append(row)
        self._progress.done |= self._learner.finished(self.log)
        if metrics:
            try:
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
            except OSError as error:
                raise storage_error(error, str(metrics.name)) from None

    def _validate(self) -> Row:
        model = self._learner.omni.model
        model.eval()
        with torch.no_grad():
            sums = self._fitting(self._learner.validation)
        model.train()
        return self._learner.summarise(sums)

    def _judge(self, loss: float) -> None:
        """Keep the best weights; end the run when the loss has not fallen for `patience` validations."""
        progress, patience = self._progress, self._settings.patience
        if loss < progress.best_loss:
            progress.best_loss, progress.bad_rounds = loss, 0
            progress.best = {name: value.detach().cpu().clone() for name, value in self._weights.items()}
        else:
            progress.bad_rounds += 1
            progress.done = patience is not None and progress.bad_rounds >= patience

    def _restore_best(self) -> None:
        with torch.no_grad():
            for name, value in self._progress.best.items():
                self._weights[name].copy_(value)

    def _checkpoint(self) -> None:
        if self._out is not None:
            weights = {name: value.detach() for name, value in self._weights.items()}
            write_checkpoint(self._out, self._progress, weights, self._optimizer, self._rng, self._run_key)
