"""Logits of given replies: a teacher-forced forward over prompts and the tokens that follow them."""

from __future__ import annotations

import nnsight
import torch
from torch import Tensor

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch


def reply_logits(omni: Omni, batch: OmniBatch) -> list[Tensor]:
    """For each query the logits [target, vocab] from which its targets are predicted, under the model's LoRA if any.

    `batch` is encoded with targets. The head is given those positions only.

    Raises:
        InputError: a batch without targets.
    """
    if batch.labels is None:
        raise InputError("logits of replies need targets: encode the queries with them")
    batch = batch.to(omni.device)
    assert batch.labels is not None
    predicted = batch.labels[:, 1:] != -100
    with torch.no_grad():
        logits = _reply_logits(omni, batch, predicted)
    return list(logits.split(predicted.sum(dim=1).tolist()))


def _reply_logits(omni: Omni, batch: OmniBatch, predicted: Tensor) -> Tensor:
    model, norm, head = omni.nnsight, omni.envoy("norm"), omni.envoy("head")
    with model.trace(**batch.inputs, use_cache=False):
        head.input = norm.output[:, :-1][predicted]
        logits = nnsight.save(head.output)
    return logits  # noqa: RET504  (bound in the trace)
