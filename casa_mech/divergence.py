"""How far one prediction of the next token is from another."""

from __future__ import annotations

import torch
from torch import Tensor

from casa_mech.errors import InputError


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats [...] of log-probabilities [..., vocab] that broadcast with each other.

    A token that `p` gives no probability (minus infinity) adds nothing, whatever `q` says. Rounding can take the sum
    below 0, where no divergence lies: it is then 0.
    """
    terms = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p.exp() * (log_p - log_q))
    return terms.sum(dim=-1).clamp(min=0)


def kl_from_logits(base: Tensor, other: Tensor) -> Tensor:
    """KL(base ‖ other) in nats at each position, float32 [...], from logits [..., vocab].

    Raises:
        InputError: shapes that differ, or logits that are not finite (minus infinity for a masked token excepted).
    """
    if base.shape != other.shape:
        raise InputError(f"KL needs two tensors of logits of one shape, not {tuple(base.shape)}, {tuple(other.shape)}")
    divergence = kl_divergence(torch.log_softmax(base.float(), dim=-1), torch.log_softmax(other.float(), dim=-1))
    if divergence.isnan().any():
        raise InputError("KL is not a number: some logits are not finite")
    return divergence
