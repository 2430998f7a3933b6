"""Training on text through traced, teacher-forced forwards with the gate inside (method notes §1.4, §1.5)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from casa_mech.casa.adapter import Adapter
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
from casa_mech.casa.config import CasaConfig, TrainSettings
from casa_mech.casa.examples import BalancedBatches, check_examples, examples_digest, split_examples
from casa_mech.casa.gate import SafetyGate
from casa_mech.casa.objective import class_weights, objective, sequence_losses
from casa_mech.casa.tokens import SafetyTokens
from casa_mech.errors import RunError
from casa_mech.files import write_text
from casa_mech.omni import Omni
from casa_mech.queries import Example
from casa_mech.trace.gate import gated_targets

Row = dict[str, float]


@dataclass(frozen=True)
class Parts:
    """What a training run changes in one model."""

    omni: Omni
    config: CasaConfig
    adapter: Adapter
    gate: SafetyGate
    tokens: SafetyTokens

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Trainable parameters by name: LoRA and token rows; safety attention."""
        rows = {f"rows.{name}": value for name, value in self.tokens.rows.named_parameters()}
        attention = {f"attention.{name}": value for name, value in self.gate.attention.named_parameters()}
        return self.adapter.parameters() | rows, attention


def batch_objective(
    parts: Parts, examples: Sequence[Example], weights: Tensor, max_reply_tokens: int
) -> tuple[Tensor, Row]:
    """The objective on `examples`, weighted by `weights` [batch] of the whole batch they are a part of, with its graph.

    Returns:
        The scalar loss, and sums over the examples by name: loss parts, v_s and right tokens of each class, counts.
    """
    omni, tokens = parts.omni, parts.tokens
    harmful = _harmful(examples).to(omni.device)
    ids = tokens.ids.tolist()
    targets = [
        [ids[example.query.label == "harmful"], *omni.reply_ids(example.reply)[:max_reply_tokens]]
        for example in examples
    ]
    batch = omni.encode([example.query for example in examples], targets, prefill=False)
    forward = gated_targets(omni, batch, parts.gate, tokens.rows)
    losses = sequence_losses(parts.config, forward, harmful)
    loss = objective(losses, weights.to(omni.device), parts.config.lambda_tok)
    columns = torch.stack([losses.token, losses.reply, forward.reading.v_s, losses.correct]).detach()
    sums: Row = {"loss": loss.item()}
    for name, chosen in (("harmful", harmful), ("benign", ~harmful)):
        values = [*(columns * chosen).sum(dim=1).tolist(), float(chosen.sum())]
        sums |= dict(zip((f"{key}_{name}" for key in ("token", "reply", "v", "right", "n")), values, strict=True))
    return loss, sums


def summarise(sums: Sequence[Row]) -> Row:
    """Means of what `batch_objective` summed, over the parts of one batch."""
    total = {key: sum(row[key] for row in sums) for key in sums[0]}
    row = {"loss": total["loss"]}
    for key in ("token", "reply", "v"):
        for name in ("harmful", "benign"):
            row[f"{key}_{name}"] = total[f"{key}_{name}"] / max(1.0, total[f"n_{name}"])
    count = total["n_harmful"] + total["n_benign"]
    row["token_accuracy"] = (total["right_harmful"] + total["right_benign"]) / count
    return row


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first `warmup` share of `total` steps, then half a cosine to zero; `step` counts from 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


class Trainer:
    """One run. `log` holds a row of metrics for each step done; with `out` the run can be interrupted and resumed."""

    def __init__(self, parts: Parts, examples: Sequence[Example], settings: TrainSettings, out: Path | None) -> None:
        check_examples(examples)
        self._parts, self._settings, self._out = parts, settings, out
        train, self._held = split_examples(examples, settings.validation, settings.seed)
        self._batches = BalancedBatches(train, settings.batch_size, settings.seed)
        self._total = settings.max_steps or self._batches.steps(settings.epochs)
        slow, fast = parts.groups()
        self._weights: dict[str, nn.Parameter] = slow | fast
        self._rates = settings.learning_rates(parts.omni.d_model)
        self._optimizer = torch.optim.AdamW(
            [{"params": list(slow.values())}, {"params": list(fast.values())}], weight_decay=settings.weight_decay
        )
        self._progress = Progress()
        self._rng: dict[str, Tensor] = {}
        self.log: list[Row] = []
        key = [examples_digest(examples), settings.model_dump_json(), parts.config.model_dump_json()]
        self._run_key = hashlib.sha256(repr([*key, parts.omni.fingerprint()]).encode()).hexdigest()

    def run(self, resume: bool, progress: bool) -> list[Row]:
        """Train to the end, or from where the checkpoint in `out` stands; the best validated weights are kept.

        Raises:
            RunError: `out` holds a run already and `resume` is off, or holds another run; or it cannot be written.
        """
        model = self._parts.omni.model
        with torch.random.fork_rng():
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
        bar = tqdm(total=self._total, initial=self._progress.step, disable=not show, desc="train", unit="step")
        self._rng, updating = rng_state(), False
        try:
            while not self._progress.done and self._progress.step < self._total:
                began = time.perf_counter()
                sums = self._gradients()
                updating = True
                row = self._update(sums)
                self._record(row, began, metrics)
                self._rng, updating = rng_state(), False
                if self._progress.step % self._settings.checkpoint_every == 0:
                    self._checkpoint()
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}", v=f"{row['v_harmful']:.2f}/{row['v_benign']:.2f}")
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
                metrics.close()

    def _gradients(self) -> list[Row]:
        """Gradients of one balanced batch, in parts that fit in memory."""
        examples = self._batches.batch(self._progress.step)
        weights = class_weights(_harmful(examples), self._parts.config.beta)
        self._optimizer.zero_grad(set_to_none=True)
        sums = []
        for start in range(0, len(examples), self._settings.micro_batch_size):
            part = slice(start, start + self._settings.micro_batch_size)
            loss, row = batch_objective(self._parts, examples[part], weights[part], self._settings.max_reply_tokens)
            loss.backward()
            sums.append(row)
        return sums

    def _update(self, sums: list[Row]) -> Row:
        """One optimiser step; returns its metrics."""
        factor = learning_rate_factor(self._progress.step, self._total, self._settings.warmup)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        row = summarise(sums)
        if not math.isfinite(row["loss"]):
            raise RunError(
                f"the loss is {row['loss']} at step {self._progress.step + 1}; lower lr_lora or lr_attention"
            )
        norm = nn.utils.clip_grad_norm_(self._weights.values(), self._settings.grad_clip)
        self._optimizer.step()
        return row | {"lr": self._rates[0] * factor, "grad_norm": float(norm)}

    def _record(self, row: Row, began: float, metrics: IO[str] | None) -> None:
        """Count the step, validate when it is time, and write the metrics down."""
        self._progress.step += 1
        step = self._progress.step
        if self._held and (step % self._settings.validate_every == 0 or step == self._total):
            row |= {f"validation_{key}": value for key, value in self._validate().items()}
            self._judge(row["validation_loss"])
        row |= {"step": step, "seconds": time.perf_counter() - began}
        self.log.append(row)
        if metrics:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()

    def _validate(self) -> Row:
        weights = class_weights(_harmful(self._held), self._parts.config.beta)
        size = self._settings.micro_batch_size
        self._parts.omni.model.eval()
        with torch.no_grad():
            sums = [
                batch_objective(
                    self._parts, self._held[start : start + size], weights[start : start + size],
                    self._settings.max_reply_tokens,
                )[1]
                for start in range(0, len(self._held), size)
            ]  # fmt: skip
        self._parts.omni.model.train()
        return summarise(sums)

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


def _harmful(examples: Sequence[Example]) -> torch.BoolTensor:
    return torch.tensor([example.query.label == "harmful" for example in examples])
