"""The four ways in which v_s changes the logits of the two safety tokens (docs/method.md §1.2, conflict C)."""

from __future__ import annotations

import torch
from torch import Tensor

from casa_mech.casa.config import Rule

EPSILON = 1e-6
"""v_s is kept this far from 0 and 1 where its logarithm is taken."""


def scale(pair: Tensor, v_s: Tensor) -> Tensor:
    """`scale`, the paper's: z_safe * (1 - v_s), z_unsafe * v_s.

    Sign-fragile: a negative logit falls as its factor grows.

    Shapes: pair [batch, 2] (safe, unsafe), v_s [batch] → [batch, 2]; so for all four rules.
    """
    return pair * torch.stack([1 - v_s, v_s], dim=-1)


def replace(pair: Tensor, v_s: Tensor) -> Tensor:
    """`replace`: logits become 1 - v_s and v_s; the language model's own are left out; unsafe wins iff v_s > 1/2."""
    return torch.stack([1 - v_s, v_s], dim=-1).to(pair.dtype)


def add_log(pair: Tensor, v_s: Tensor) -> Tensor:
    """`add_log`: z_safe + log(1 - v_s), z_unsafe + log v_s: probabilities multiply; monotone for logits of any sign."""
    v_s = v_s.clamp(EPSILON, 1 - EPSILON)
    return pair + torch.stack([torch.log1p(-v_s), torch.log(v_s)], dim=-1)


def scale_above(pair: Tensor, v_s: Tensor, floor: Tensor) -> Tensor:
    """`scale_above`: `scale` on the height of the logits above `floor` [batch], the smallest logit of the vocabulary.

    The floor is added back, so that the pair stays comparable with the other logits.
    """
    floor = floor.unsqueeze(-1)
    return floor + scale(pair - floor, v_s)


def rewrite(rule: Rule, logits: Tensor, token_ids: Tensor, v_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `rule` to the columns `token_ids` [2] (safe, unsafe) of `logits` [batch, vocab], given `v_s` [batch].

    Returns:
        The new logits [batch, vocab], the language model's own pair [batch, 2] and the rewritten pair [batch, 2]; all
        in at least float32, since log v_s does not survive half precision.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    raw = logits[:, token_ids]
    if rule == "scale":
        pair = scale(raw, v_s)
    elif rule == "replace":
        pair = replace(raw, v_s)
    elif rule == "add_log":
        pair = add_log(raw, v_s)
    else:
        pair = scale_above(raw, v_s, logits.detach().amin(dim=-1))
    return logits.index_copy(1, token_ids, pair), raw, pair
