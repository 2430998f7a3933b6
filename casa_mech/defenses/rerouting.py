"""Representation rerouting: losses and schedule of circuit breakers (arXiv 2406.04313; docs/method.md §5.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from casa_mech.casa.adapter import Adapter
from casa_mech.casa.config import LoraSettings
from casa_mech.casa.examples import Passes, check_examples
from casa_mech.casa.trainer import Row
from casa_mech.errors import InputError
from casa_mech.identity import examples_digest
from casa_mech.limits import GREATEST_SEED
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Example
from casa_mech.trace.layers import layer_states

WINDOW = 10
"""Steps over which L_rr is averaged before it is held against the criterion."""
DEPTHS = (0.3125, 0.625)
"""Depth of the target layers: 10 and 20 of 32."""


class CircuitBreakerSettings(LoraSettings):
    """Circuit breakers; the defaults are those published for Llama-3-8B."""

    lora_alpha: int = Field(default=16, ge=1)
    """Scale of LoRA's update, which is multiplied by lora_alpha / lora_r."""
    alpha: float = Field(default=10.0, gt=0)
    """Scale of both losses (Mistral-7B: 5)."""
    layers: tuple[int, ...] | None = None
    """Target layers, counted in blocks passed (layer l is the residual stream after l blocks, as in the authors'
    code); default, 0.3125 and 0.625 of the depth."""
    schedule_steps: int = Field(default=150, ge=1)
    """Steps of the published schedule. Training ends after them if L_rr has fallen by `fall`."""
    max_steps: int = Field(default=600, ge=1)
    """Most optimiser steps: where L_rr has not fallen after the schedule, training goes on with the weights at its end
    until it has, or until here, and has then failed. Fewer than `schedule_steps` shorten the schedule."""
    fall: float = Field(default=0.5, gt=0, lt=1)
    """Share by which L_rr, which starts at 1, has to fall in the mean over the last `WINDOW` steps. The criterion is on
    the training loss alone."""
    horizon: int | None = Field(default=None, ge=1)
    """2T₀ of the schedule; default, twice its steps, so that both weights end at half of `alpha`."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences a step in the circuit-breaker batch, and in the retain batch."""
    micro_batch_size: int = Field(default=16, ge=1)
    """Sequences a forward; the gradients of a batch's parts are averaged. Halved, with a warning, where they do not fit
    into memory."""
    gradient_checkpointing: bool = False
    """As in `TrainSettings`."""
    blank_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the harmful completions that are rerouted without their request (Llama: half; Mistral: none)."""
    refusal_share: float = Field(default=0.25, ge=0, le=1)
    """Share of refusals to harmful requests in the retain batch; the rest are benign answers."""
    lr: float | None = Field(default=None, gt=0)
    """Constant learning rate; default, the published 1e-4 from d_model 1024 on, else 1e-2.

    At the start the states are the frozen ones, and a cosine has no slope at its maximum. Whether rerouting gets away
    from there before retaining holds it back depends on the size of the first steps. On the first organism L_rr stayed
    at 1 for the published 150 steps with rates up to 5e-3; 1e-2 was the first of six tried with which it fell. How far
    differs from seed to seed and from model to model (on the rebuilt organism it does not fall), hence `fall`.
    """
    max_reply_tokens: int = Field(default=512, ge=1)
    """Replies are cut to this many tokens."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints (only with an output folder)."""
    seed: int = Field(default=0, ge=0, le=GREATEST_SEED)
    """Of LoRA's start, the batches, the blanked requests and LoRA's dropout."""

    @property
    def scheduled(self) -> int:
        """Steps of the schedule."""
        return min(self.schedule_steps, self.max_steps)

    @property
    def two_t0(self) -> int:
        """2T₀ of the schedule, in steps."""
        return self.horizon or 2 * self.scheduled

    def failure(self, log: Sequence[Row]) -> str:
        """In what the training that left the rows `log` falls short of `fall`, in words; empty where it does not."""
        last = [row["reroute"] for row in log[-WINDOW:]]
        mean = sum(last) / len(last)
        if mean <= 1 - self.fall:
            return ""
        return f"L_rr is {mean:.2f} after {len(log)} steps, more than {1 - self.fall:g}"

    def target_layers(self, n_layers: int) -> list[int]:
        """The target layers in a model of `n_layers` blocks, rising.

        Raises:
            InputError: a layer that it does not have.
        """
        # Halves are rounded up: 18 of 28, 23 of 36.
        layers = self.layers or [max(1, int(depth * n_layers + 0.5)) for depth in DEPTHS]
        if not 1 <= min(layers) <= max(layers) <= n_layers:
            raise InputError(f"layers={tuple(layers)}: a model of {n_layers} blocks has layers 1 to {n_layers}")
        return sorted(set(layers))

    def learning_rate(self, d_model: int) -> float:
        """The constant learning rate for a model of width `d_model`."""
        return self.lr or (1e-4 if d_model >= 1024 else 1e-2)

    def depth(self, n_layers: int) -> int:
        """How many blocks get a LoRA, and are retained: one beyond the last target layer, as published."""
        return min(n_layers, max(self.target_layers(n_layers)) + 1)

    @model_validator(mode="after")
    def _schedule_holds(self) -> Self:
        if self.two_t0 < self.scheduled:
            raise InputError(f"horizon={self.horizon} is shorter than its {self.scheduled} steps: rerouting would end")
        return self


def coefficients(step: int, alpha: float, horizon: int) -> tuple[float, float]:
    """(c_s, c_r) at `step`: weight of rerouting, α(1 - t/2T₀), and of retaining, α·t/2T₀; `horizon` is 2T₀."""
    progress = step / horizon
    return alpha * (1 - progress), alpha * progress


def reroute_loss(states: Tensor, frozen: Tensor, mask: Tensor) -> Tensor:
    """L_rr = Σ_layers Σ_positions m · ReLU(cos(h, h_frozen)) / Σ m, with m repeated for each layer; a scalar.

    1 for the frozen model's states, 0 for orthogonal or opposite ones. Shapes: states and frozen [layer, batch,
    position, d_model], mask [batch, position] (real tokens, prompt and completion).
    """
    mask = mask.bool().expand(states.shape[:-1])
    cosine = functional.cosine_similarity(states[mask].float(), frozen[mask].float(), dim=-1)
    return torch.relu(cosine).mean()


def retain_loss(states: Tensor, frozen: Tensor, mask: Tensor) -> Tensor:
    """L_retain = mean over layers, sequences and positions of m · ‖h - h_frozen‖₂; a scalar.

    Padded positions add nothing, but count in the mean, as in the authors' code. Shapes as in `reroute_loss`.
    """
    # The norm's gradient at 0, where training starts, is taken as 0; padding may hold anything.
    difference = (states.float() - frozen.float()).masked_fill(~mask.bool().unsqueeze(-1), 0.0)
    return torch.linalg.vector_norm(difference, dim=-1).mean()


class Rerouting:
    """The `Learner` of circuit breakers.

    Of each harmful example the circuit-breaker set takes the query with its harmful completion (`meta["compliance"]`),
    the retain set the refusal; the benign examples are retained as they are.

    Raises:
        InputError: examples with media, without a label or, where harmful, without a completion.
    """

    validates = False

    def __init__(
        self, omni: Omni, adapter: Adapter, config: CircuitBreakerSettings, examples: Sequence[Example]
    ) -> None:
        check_examples(examples)
        self._adapter, self._config, self._size = adapter, config, config.micro_batch_size
        self.omni = omni
        self.targets = config.target_layers(omni.n_layers)
        self.depth = config.depth(omni.n_layers)
        self.steps = config.max_steps
        self.key = (examples_digest(examples), "circuit-breaker", config.model_dump_json())
        harmful = [example for example in examples if example.query.label == "harmful"]
        benign = [example for example in examples if example.query.label == "benign"]
        self._sets = ([_completed(example) for example in harmful], benign, harmful)
        refusals = round(config.refusal_share * config.batch_size)
        counts = (config.batch_size, config.batch_size - refusals, refusals)
        self._passes = [
            Passes(range(len(members)), count, (config.seed, number))
            for number, (members, count) in enumerate(zip(self._sets, counts, strict=True))
        ]

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """LoRA's parameters by name, and nothing."""
        return self._adapter.parameters(), {}

    def rate(self, step: int) -> float:
        """A constant learning rate."""
        return 1.0

    def losses(self, step: int) -> Iterator[tuple[Tensor, Row]]:
        """c_s · L_rr on the circuit-breaker batch, then c_r · L_retain on the retain batch."""
        c_s, c_r = coefficients(min(step, self._config.scheduled), self._config.alpha, self._config.two_t0)
        broken, benign, refused = (
            [members[index] for index in passes.at(step)]
            for members, passes in zip(self._sets, self._passes, strict=True)
        )
        blank = np.random.default_rng([self._config.seed, 3, step]).random(len(broken)) < self._config.blank_share
        for rows in self._micro_batches(len(broken)):
            batch = blanked(self._encode(broken[rows]), torch.from_numpy(blank[rows]))
            states, frozen, mask = self._both(batch, max(self.targets))
            loss = reroute_loss(states[self.targets], frozen[self.targets], mask)
            yield self._weighted("reroute", loss, c_s, len(broken[rows]) / len(broken))
        retained = [*benign, *refused]
        for rows in self._micro_batches(len(retained)):
            loss = retain_loss(*self._both(self._encode(retained[rows]), self.depth))
            yield self._weighted("retain", loss, c_r, len(retained[rows]) / len(retained))

    def validation(self) -> list[Row]:
        """None: the authors train for a fixed number of steps."""
        return []

    def halve(self) -> str:
        """Take half as many sequences a forward from now on; see `Learner`."""
        self._size = min(self._size, self._config.batch_size) // 2
        return f"{self._size} sequence{'s' * (self._size > 1)}" if self._size else ""

    def finished(self, log: Sequence[Row]) -> bool:
        """True once the schedule is over and L_rr has fallen."""
        return len(log) >= self._config.scheduled and not self._config.failure(log)

    def summarise(self, sums: Sequence[Row]) -> Row:
        """`loss`, and its parts `reroute` and `retain` before their weights `c_s` and `c_r`."""
        names = dict.fromkeys(name for row in sums for name in row)
        return {name: sum(row.get(name, 0.0) for row in sums) for name in names}

    def _weighted(self, name: str, loss: Tensor, weight: float, share: float) -> tuple[Tensor, Row]:
        value = loss.item()
        row = {"loss": share * weight * value, name: share * value}
        row["c_s" if name == "reroute" else "c_r"] = share * weight
        return share * weight * loss, row

    def _micro_batches(self, size: int) -> Iterator[slice]:
        """Slices of a batch that fit in memory."""
        step = self._size
        for start in range(0, size, step):
            yield slice(start, start + step)

    def _encode(self, examples: Sequence[Example]) -> OmniBatch:
        limit = self._config.max_reply_tokens
        targets = [self.omni.reply_ids(example.reply)[:limit] for example in examples]
        return self.omni.encode([example.query for example in examples], targets, prefill=False)

    def _both(self, batch: OmniBatch, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """States [layer, batch, position, d_model] after 0 to `depth` blocks with LoRA and without, and the mask."""
        self._adapter.enable(False)
        try:
            with torch.no_grad():
                frozen = layer_states(self.omni, batch, depth)
        finally:
            self._adapter.enable(True)
        return layer_states(self.omni, batch, depth), frozen, batch.inputs["attention_mask"]


def blanked(batch: OmniBatch, rows: Tensor) -> OmniBatch:
    """`batch` with the user's words of `rows` (bool [batch]) hidden, as if the request were empty."""
    user = torch.stack(list(batch.modality.values())).any(dim=0)
    hidden = user & rows.to(user.device).unsqueeze(1)
    mask = batch.inputs["attention_mask"].masked_fill(hidden, 0)
    return replace(batch, inputs={**batch.inputs, "attention_mask": mask})


def _completed(example: Example) -> Example:
    completion = example.query.meta.get("compliance")
    if not completion:
        raise InputError(
            f"query {example.query.id}: circuit breakers reroute a harmful completion, and it has none; "
            "name the table's column of them with --completion-column (in Python: meta['compliance'])"
        )
    return Example(query=example.query, reply=completion)
