"""Supervised training on text, shared by CASA and plain fine-tuning (docs/method.md §1.4, §5.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import BoolTensor, Tensor, nn

from casa_mech.casa.adapter import Adapter
from casa_mech.casa.config import CasaConfig, InferenceSettings, TrainSettings
from casa_mech.casa.examples import (
    CLASSES,
    BalancedBatches,
    Counterfactual,
    check_examples,
    counterfactuals,
    split_examples,
)
from casa_mech.casa.gate import SafetyGate
from casa_mech.casa.objective import class_weights, objective, sequence_losses
from casa_mech.casa.tokens import SafetyTokens
from casa_mech.casa.trainer import Row, learning_rate_factor
from casa_mech.identity import examples_digest
from casa_mech.omni import Omni
from casa_mech.omni.batch import encode
from casa_mech.queries import Example
from casa_mech.trace.gate import gated_targets


class Trainable(Protocol):
    """The parameters that a supervised run changes in one model, and its objective."""

    @property
    def omni(self) -> Omni:
        """The model."""

    @property
    def beta(self) -> float:
        """Weight of the harmful sequences."""

    @property
    def counterfactual(self) -> float:
        """Share of the benign examples with a counterfactual beside them."""

    @property
    def key(self) -> str:
        """All that determines the objective and the initial values."""

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Trainable parameters by name, in the two groups that have a learning rate each."""

    def objective(self, examples: Sequence[Example], weights: Tensor, max_reply_tokens: int) -> tuple[Tensor, Row]:
        """The objective on `examples`, weighted by `weights` [batch] of the whole batch they are a part of; and sums
        over the examples by name (see `class_sums`)."""


@dataclass(frozen=True)
class Parts:
    """CASA's modules on one model, which training changes."""

    omni: Omni
    """The model."""
    config: CasaConfig
    """The method's options."""
    adapter: Adapter
    """LoRA on the language model."""
    gate: SafetyGate
    """Safety attention and logit rule."""
    tokens: SafetyTokens
    """The safety tokens, with their trainable rows."""

    @property
    def beta(self) -> float:
        """Weight of the harmful sequences."""
        return self.config.beta

    @property
    def counterfactual(self) -> float:
        """Share of the benign examples with a counterfactual beside them."""
        return self.config.counterfactual

    @property
    def key(self) -> str:
        """The configuration, as far as training depends on it."""
        return self.config.model_dump_json(exclude=set(InferenceSettings.model_fields))

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Trainable parameters by name: LoRA and token rows; safety attention, if there is one."""
        rows = {f"rows.{name}": value for name, value in self.tokens.rows.named_parameters()}
        module = self.gate.attention
        attention = {} if module is None else {f"attention.{name}": value for name, value in module.named_parameters()}
        return self.adapter.parameters() | rows, attention

    def objective(self, examples: Sequence[Example], weights: Tensor, max_reply_tokens: int) -> tuple[Tensor, Row]:
        """Safety token and reply, with the gate in the forward; sums of the loss parts, v_s and right tokens.

        A counterfactual's token is an intervention, so it has no loss of the token and counts in none of its sums.
        """
        omni, tokens = self.omni, self.tokens
        harmful, intervened = (mask.to(omni.device) for mask in (is_harmful(examples), is_counterfactual(examples)))
        ids = tokens.ids.tolist()
        targets = [
            [ids[unsafe], *omni.reply_ids(example.reply)[:max_reply_tokens]]
            for example, unsafe in zip(examples, (harmful | intervened).tolist(), strict=True)
        ]
        batch = omni.encode([example.query for example in examples], targets, prefill=False)
        forward = gated_targets(omni, batch, self.gate, tokens.rows)
        losses = sequence_losses(self.config, forward, harmful)
        losses = replace(losses, token=losses.token.masked_fill(intervened, 0.0))
        loss = objective(losses, weights.to(omni.device), self.config.lambda_tok)
        columns = {"token": losses.token, "reply": losses.reply, "v": forward.reading.v_s, "right": losses.correct}
        sums = class_sums({name: column[~intervened] for name, column in columns.items()}, harmful[~intervened])
        if self.config.counterfactual:
            sums |= {"reply_counterfactual": losses.reply[intervened].sum().item()}
            sums |= {"n_counterfactual": float(intervened.sum())}
        return loss, {"loss": loss.item(), **sums}


class Supervised:
    """A `Learner` of labelled examples: class-balanced batches, a validation set, a cosine schedule.

    Raises:
        InputError: examples with media or without a label, a prompt beyond the model's positions, or a class without
            examples.
    """

    def __init__(self, parts: Trainable, examples: Sequence[Example], settings: TrainSettings) -> None:
        check_examples(examples)
        parts.omni.check_lengths(example.query for example in examples)
        self._parts, self._settings = parts, settings
        train, held_out = split_examples(examples, settings.validation, settings.seed)
        refusals = [example.reply for example in train if example.query.label == "harmful"]
        added, added_held_out = (
            counterfactuals(rows, parts.counterfactual, refusals, settings.seed) for rows in (train, held_out)
        )
        self._size, self._budget, self._largest = settings.micro_batch_size, settings.forward_tokens, 1
        self._batches = BalancedBatches(train, settings.batch_size, settings.seed, added)
        # The weights that are kept are those of the lowest validation loss, so it is the loss that is trained on.
        self._held_out: list[Example] = [*held_out, *added_held_out.values()]
        self.steps = settings.max_steps or self._batches.steps(settings.epochs)
        self.validates = bool(self._held_out)
        self.key = (examples_digest(examples), settings.model_dump_json(), parts.key)

    @property
    def omni(self) -> Omni:
        """The model."""
        return self._parts.omni

    def groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Trainable parameters by name, in the two groups that have a learning rate each."""
        return self._parts.groups()

    def rate(self, step: int) -> float:
        """A short rise, then half a cosine."""
        return learning_rate_factor(step, self.steps, self._settings.warmup)

    def losses(self, step: int) -> Iterator[tuple[Tensor, Row]]:
        """The objective on the batch of `step`, in parts that fit in memory."""
        yield from self._objectives(self._batches.batch(step))

    def validation(self) -> list[Row]:
        """The objective's sums on the examples held out."""
        return [row for _, row in self._objectives(self._held_out)]

    def halve(self) -> str:
        """Take half as much a forward from now on; see `Learner`."""
        if self._largest == 1:
            return ""
        self._largest = 1
        if self._budget is not None:
            self._budget = max(1, self._budget // 2)
            return f"{self._budget} tokens"
        self._size = max(1, self._size // 2)
        return f"{self._size} example{'s' * (self._size > 1)}"

    def finished(self, log: Sequence[Row]) -> bool:
        """Never: how long to train is told by the validation set."""
        return False

    def summarise(self, sums: Sequence[Row]) -> Row:
        """Means of what the objective summed, over the parts of one batch."""
        return class_means(sums)

    def _objectives(self, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Row]]:
        weights = class_weights(is_harmful(examples), self._parts.beta, is_counterfactual(examples))
        for places in self._forwards(examples):
            self._largest = max(self._largest, len(places))
            members = [examples[place] for place in places]
            yield self._parts.objective(members, weights[places], self._settings.max_reply_tokens)

    def _forwards(self, examples: Sequence[Example]) -> list[list[int]]:
        """The places of the examples of each forward."""
        if self._budget is not None:
            return within(self._lengths(examples), self._budget)
        size, order = self._size, list(range(len(examples)))
        if self._settings.by_length and len(examples) > size:
            order.sort(key=lambda place: len(examples[place].query.text) + len(examples[place].reply))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _lengths(self, examples: Sequence[Example]) -> list[int]:
        """Positions of each example: its prompt, a safety token, and its reply."""
        omni, limit = self.omni, self._settings.max_reply_tokens
        prompts = encode(omni.processor, [example.query for example in examples], prefill=False)
        lengths = prompts.inputs["attention_mask"].sum(dim=1).tolist()
        replies = [len(omni.reply_ids(example.reply)[:limit]) for example in examples]
        return [prompt + 1 + reply for prompt, reply in zip(lengths, replies, strict=True)]


def within(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of `lengths` in groups of like length, the shortest first, whose padded size is at most `budget`.

    One that is longer than that is a group of its own.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[place] <= budget:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def is_harmful(examples: Sequence[Example]) -> BoolTensor:
    """True for each example that is labelled harmful; bool [batch]."""
    return torch.tensor([example.query.label == "harmful" for example in examples])


def is_counterfactual(examples: Sequence[Example]) -> BoolTensor:
    """True for each example whose token is an intervention; bool [batch]."""
    return torch.tensor([isinstance(example, Counterfactual) for example in examples])


def class_sums(columns: Mapping[str, Tensor], harmful: BoolTensor) -> Row:
    """For each column [batch] its sums over the harmful and the benign examples, and how many there are of each."""
    values = torch.stack([column.to(torch.float32) for column in columns.values()]).detach()
    sums: Row = {}
    for label, is_member in zip(CLASSES, (~harmful, harmful), strict=True):
        of_class = [*(values * is_member).sum(dim=1).tolist(), float(is_member.sum())]
        sums |= dict(zip((f"{key}_{label}" for key in (*columns, "n")), of_class, strict=True))
    return sums


def class_means(sums: Sequence[Row]) -> Row:
    """Means of `class_sums` over the parts of one batch; right tokens of both classes become `token_accuracy`.

    Beside them the mean loss of the counterfactuals' replies, in a run with counterfactuals.
    """
    total = {key: sum(row[key] for row in sums) for key in sums[0]}
    row = {"loss": total["loss"]}
    for key in total:
        name = key.removesuffix("_harmful")
        if name not in (key, "n", "right"):
            row |= {f"{name}_{label}": total[f"{name}_{label}"] / max(1.0, total[f"n_{label}"]) for label in CLASSES}
    if "n_counterfactual" in total:
        row["reply_counterfactual"] = total["reply_counterfactual"] / max(1.0, total["n_counterfactual"])
    if "right_harmful" in total:
        count = total["n_harmful"] + total["n_benign"]
        row["token_accuracy"] = (total["right_harmful"] + total["right_benign"]) / count
    return row
