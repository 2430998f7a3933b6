"""What is computed over the whole vocabulary, in chunks of rows.

A published model has 151,936 tokens: float32 logits of 16 replies of 256 tokens are 2.5 GB. The logits stay in the
model's own dtype, and what needs float32 sees so many rows at a time that a chunk is `CHUNK` numbers at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import LongTensor, Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24
"""Numbers in a chunk; 64 MiB of float32, 110 rows of a vocabulary of 151,936 tokens."""


def rows_in_chunk(width: int) -> int:
    """How many rows of `width` numbers are a chunk; at least one."""
    return max(1, CHUNK // max(1, width))


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` rows of `width` numbers each, a chunk each."""
    size = rows_in_chunk(width)
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor`, in float32 where it has less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits: Tensor, tokens: LongTensor) -> Tensor:
    """Minus the log-probability of `tokens` [row] under `logits` [row, vocab]; at least float32 [row], with gradient.

    Of several chunks each is brought to float32 for itself, and once more in the backward pass, so that the graph holds
    none of them.
    """
    size = rows_in_chunk(logits.shape[-1])
    if len(logits) <= size:
        return _cross_entropy(logits, tokens)
    parts = zip(logits.split(size), tokens.split(size), strict=True)
    return torch.cat(
        [checkpoint(_cross_entropy, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    )


def _cross_entropy(logits: Tensor, tokens: LongTensor) -> Tensor:
    return functional.cross_entropy(at_least_float32(logits), tokens, reduction="none")
