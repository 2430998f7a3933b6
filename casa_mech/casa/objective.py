"""CASA's training objective (docs/method.md §1.4): safety token and reply, balanced between the two classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor

from casa_mech.casa.attention import SAFE, UNSAFE
from casa_mech.casa.config import CasaConfig
from casa_mech.trace.gate import GatedTargets
from casa_mech.trace.targets import Targets
from casa_mech.vocabulary import cross_entropy


@dataclass(frozen=True)
class SequenceLosses:
    """Losses of each sequence of a batch, at least float32 whatever the model's dtype is."""

    token: Tensor
    """Loss of the safety token [batch]."""
    reply: Tensor
    """Mean loss of the reply's tokens [batch]."""
    correct: Tensor
    """True where the safety token is the right one [batch]."""


def sequence_losses(config: CasaConfig, targets: GatedTargets, harmful: BoolTensor) -> SequenceLosses:
    """Losses of each sequence of a teacher-forced, gated forward; `harmful` [batch] is the true class.

    The reply's loss is a mean over its tokens, apart from the safety token's: neither a long reply nor a short one
    drowns the decision. The token's softmax runs over the vocabulary or over the pair (`config.ce_support`).
    """
    losses = cross_entropy(targets.logits, targets.tokens)
    truth = torch.where(harmful, UNSAFE, SAFE)
    if config.ce_support == "two_way":
        token = cross_entropy(targets.reading.pair, truth)
    else:
        token = cross_entropy(targets.gated, targets.tokens[targets.first])
    is_reply = torch.ones_like(losses).index_fill(0, targets.first, 0.0)
    count = torch.zeros_like(token).index_add(0, targets.row, is_reply)
    total = torch.zeros_like(token).index_add(0, targets.row, losses * is_reply)
    correct = targets.reading.pair.detach().argmax(dim=1) == truth
    return SequenceLosses(token, total / count.clamp(min=1), correct)


def reply_losses(targets: Targets, size: int) -> Tensor:
    """Mean loss of the reply's tokens [batch] of a teacher-forced forward without safety tokens; `size` is batch."""
    losses = cross_entropy(targets.logits, targets.tokens)
    total = losses.new_zeros(size).index_add(0, targets.row, losses)
    return total / torch.bincount(targets.row, minlength=size).clamp(min=1)


def class_weights(harmful: BoolTensor, beta: float, intervened: BoolTensor | None = None) -> Tensor:
    """Weight of each sequence [batch]: beta shared by the harmful ones, 1 - beta by the benign ones.

    A counterfactual (`intervened`, [batch]) comes on top with the weight of one benign sequence, so that the others
    weigh what they weigh without it (docs/method.md §1.10).
    """
    benign = ~harmful if intervened is None else ~harmful & ~intervened
    n_harmful = harmful.sum().clamp(min=1)
    n_benign = benign.sum().clamp(min=1)
    return torch.where(harmful, beta / n_harmful, (1 - beta) / n_benign)


def objective(losses: SequenceLosses, weights: Tensor, lambda_tok: float) -> Tensor:
    """L = Σ_i w_i (λ_tok · token_i + reply_i), with `weights` [batch] from `class_weights`; a scalar."""
    return (weights * (lambda_tok * losses.token + losses.reply)).sum()
