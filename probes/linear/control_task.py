"""Selectivity after Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks" (arXiv 1909.03368).

A control task gives every type (a word there, a topic here) a label at random. States that tell types apart let a probe
learn it by heart, so a probe's score means something only as far as it is above the control task's. Both are judged on
requests whose topic was met in training: elsewhere the control task has no answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from casa_mech.errors import InputError
from casa_mech.judging.hypothesis import permuted_labels
from probes.linear.estimators import fit_batch
from probes.linear.validation import PENALTIES, auroc_of


@dataclass(frozen=True)
class ControlTask:
    """AUROCs at every site on requests whose topic was met in training."""

    task: np.ndarray
    """[site]: of the labels themselves."""
    control: np.ndarray
    """[site, repeat]: of labels dealt among topics."""
    n: int
    """Requests that are judged."""

    @property
    def selectivity(self) -> np.ndarray:
        """[site]: `task` minus the mean of `control`."""
        gap: np.ndarray = self.task - self.control.mean(axis=1)
        return gap


def control_task(
    states: np.ndarray,
    labels: np.ndarray,
    topics: np.ndarray,
    repeats: int = 5,
    folds: int = 5,
    seed: int = 0,
    penalty: float = PENALTIES[1],
) -> ControlTask:
    """A logistic probe on the labels and on `repeats` control tasks, in the same folds; a topic's requests are in many.

    Args:
        states: [site, row, d_model]. labels: bool [row]. topics: str [row]. penalty: of the probe.
        repeats: control tasks; folds, seed: of the splits and the control tasks.

    Raises:
        InputError: no topic with two requests, or of one class only.
    """
    rng = np.random.default_rng(seed)
    _, member, size = np.unique(topics, return_inverse=True, return_counts=True)
    fold = _spread(member, folds, rng)
    judged = size[member] > 1
    if not judged.any():
        raise InputError("a control task needs topics with two requests or more: ask for more requests")
    tasks = np.concatenate([labels[None], permuted_labels(labels, topics, repeats, rng)])
    sums = tasks[:, judged].sum(axis=1)
    both: np.ndarray = (sums > 0) & (sums < judged.sum())
    if not both[0] or not both[1:].any():
        raise InputError("a control task needs topics of both classes with two requests or more: ask for more requests")
    tasks = tasks[both]
    training = fold[None] != np.arange(folds)[:, None]
    tensor = torch.as_tensor(states, dtype=torch.float32)
    models = fit_batch(
        "logistic", tensor, torch.from_numpy(np.repeat(tasks, folds, axis=0)),
        torch.from_numpy(np.tile(training, (len(tasks), 1))), penalty,
    )  # fmt: skip
    scores = models.scores(tensor).numpy().reshape(len(states), len(tasks), folds, len(labels))
    held = scores[:, :, fold, np.arange(len(labels))][..., judged]
    aurocs = np.stack([auroc_of(held[:, task], tasks[task, judged]) for task in range(len(tasks))], axis=1)
    return ControlTask(aurocs[:, 0], aurocs[:, 1:], int(judged.sum()))


def _spread(member: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """A fold for each row, int [row]: the rows of a topic in different ones, as far as there are so many folds."""
    order = rng.permutation(len(member))
    order = order[np.argsort(member[order], kind="stable")]
    fold = np.empty(len(member), dtype=int)
    # One topic after the other, dealt round: no fold is smaller than another by more than one row.
    fold[order] = (np.arange(len(member)) + rng.integers(folds)) % folds
    return fold
