"""A teacher-forced forward without any gate: the logits that predict the targets, and no others."""

from __future__ import annotations

from dataclasses import dataclass

import nnsight
from torch import LongTensor, Tensor

from casa_mech.omni import Omni, OmniBatch


@dataclass(frozen=True)
class Targets:
    """A teacher-forced forward; `target` counts the supervised tokens of the whole batch, row by row."""

    logits: Tensor
    """[target, vocab]."""
    tokens: LongTensor
    """[target]."""
    row: LongTensor
    """[target]: the query that each belongs to."""


def plain_targets(omni: Omni, batch: OmniBatch, added: Tensor | None = None) -> Targets:
    """Teacher-forced forward over `batch`, whose `labels` must be set; keeps the autograd graph.

    `added` [batch, position, d_model] is added to the word embeddings; zeros, for their gradient.
    """
    batch = batch.to(omni.device)
    assert batch.labels is not None
    predicted = batch.labels[:, 1:] != -100
    logits = _logits(omni, batch, predicted, added)
    return Targets(logits, batch.labels[:, 1:][predicted], predicted.nonzero()[:, 0])


def _logits(omni: Omni, batch: OmniBatch, predicted: Tensor, added: Tensor | None) -> Tensor:
    model, embedding = omni.nnsight, omni.envoy("embedding")
    norm, head = omni.envoy("norm"), omni.envoy("head")
    with model.trace(**batch.inputs, use_cache=False):
        if added is not None:
            embedding.output = embedding.output + added
        head.input = norm.output[:, :-1][predicted]
        logits = nnsight.save(head.output)
    return logits  # noqa: RET504  (bound in the trace)
