"""The training set: checked, split for validation, served in class-balanced batches that depend on the step alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from casa_mech.errors import InputError
from casa_mech.queries import Example, Label

CLASSES: tuple[Label, ...] = ("benign", "harmful")
"""The labels, in the order of the safety tokens; a label's index seeds its draws, so the order is not to be changed."""


class Counterfactual(Example):
    """A benign query with the unsafe token put before a refusal: an intervention on the token, not a decision."""


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse examples that CASA is not trained on.

    Raises:
        InputError: media in a query (CASA learns from text only), a missing label, one prompt under both labels, or a
            class without examples.
    """
    for example in examples:
        query = example.query
        if query.modalities - {"text"} or any(part.kind != "text" for turn in query.history for part in turn.parts):
            raise InputError(
                f"query {query.id}: CASA is trained on text only; leave images and audio to the evaluation"
            )
        if query.label is None:
            raise InputError(f"query {query.id}: a training example needs a label, harmful or benign")
    first: dict[Any, Example] = {}
    for example in examples:
        query = example.query
        other = first.setdefault((query.system, query.history, query.text), example)
        if other.query.label != query.label:
            raise InputError(
                f"queries {other.query.id} ({other.query.label}) and {query.id} ({query.label}) have the same prompt: "
                "correct a label, or leave one out"
            )
    for label in CLASSES:
        if not any(example.query.label == label for example in examples):
            raise InputError(f"no {label} example among {len(examples)}; training needs both classes")


def split_examples(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation examples: `share` of each class is held out, at least one of each if share > 0.

    Raises:
        InputError: nothing of a class is left to train on.
    """
    held_out: set[int] = set()
    for number, label in enumerate(CLASSES):
        of_class = [index for index, example in enumerate(examples) if example.query.label == label]
        order = np.random.default_rng([seed, number]).permutation(of_class)
        count = max(1, round(share * len(of_class))) if share > 0 and len(of_class) > 1 else 0
        if count and count == len(of_class):
            raise InputError(
                f"validation={share}: none of the {count} {label} examples would be left to train on; give a smaller "
                "share, or more examples"
            )
        held_out.update(int(index) for index in order[:count])
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def counterfactuals(
    examples: Sequence[Example], share: float, refusals: Sequence[str], seed: int
) -> dict[int, Counterfactual]:
    """By the index in `examples` of a benign one, its counterfactual, for `share` of them.

    Each gets one of `refusals`. The rule is one-sided: no harmful query is ever given the safe token and an answer.
    """
    if not share:
        return {}
    rng = np.random.default_rng([seed, len(CLASSES)])
    benign = [index for index, example in enumerate(examples) if example.query.label == "benign"]
    chosen = sorted(int(index) for index in rng.permutation(benign)[: round(share * len(benign))])
    replies = rng.choice(len(refusals), size=len(chosen))
    return {
        index: Counterfactual(query=examples[index].query, reply=refusals[reply])
        for index, reply in zip(chosen, replies, strict=True)
    }


class Passes:
    """Batches of `per_step` of `members`, from shuffled passes, one after the other.

    A step's batch is a function of `seed` and the step, so that a resumed run sees what it would have seen.
    """

    def __init__(self, members: Sequence[int], per_step: int, seed: Sequence[int]) -> None:
        self._members, self._per_step, self._seed = members, per_step, list(seed)
        self._order = lru_cache(maxsize=8)(self._shuffled)

    def at(self, step: int) -> list[int]:
        """The members of `step` (from 0)."""
        size = len(self._members)
        positions = range(step * self._per_step, (step + 1) * self._per_step)
        return [self._members[self._order(position // size)[position % size]] for position in positions]

    def _shuffled(self, number: int) -> list[int]:
        rng = np.random.default_rng([*self._seed, number])
        return [int(index) for index in rng.permutation(len(self._members))]


class BalancedBatches:
    """Batches of which half are harmful; each class goes through passes of its own, the smaller one more often.

    An example with a counterfactual, by its index, brings it along: such batches are longer by their number.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        counterfactuals: Mapping[int, Counterfactual] = MappingProxyType({}),
    ) -> None:
        self._examples, self._counterfactuals = examples, counterfactuals
        self._half = batch_size // 2
        classes = [
            [index for index, example in enumerate(examples) if example.query.label == label] for label in CLASSES
        ]
        self._largest = max(map(len, classes))
        self._passes = [Passes(members, self._half, (seed, number)) for number, members in enumerate(classes)]

    def steps(self, epochs: float) -> int:
        """Steps in `epochs` passes over the larger class."""
        return max(1, round(epochs * self._largest / self._half))

    def batch(self, step: int) -> list[Example]:
        """The examples of `step` (from 0), the classes alternating; the counterfactuals after them."""
        rows = [passes.at(step) for passes in self._passes]
        added = [self._counterfactuals[index] for index in rows[0] if index in self._counterfactuals]
        return [*(self._examples[index] for pair in zip(*rows, strict=True) for index in pair), *added]
