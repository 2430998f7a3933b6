"""Losses over the vocabulary: exact in float32, and no more than a chunk of it at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from casa_mech import vocabulary
from casa_mech.vocabulary import chunks, cross_entropy


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (9 * torch.randn(50, 300, generator=generator)).to(dtype)
    return logits.requires_grad_(), torch.randint(300, (50,), generator=generator)


def test_a_chunk_is_all_that_there_is_at_a_time() -> None:
    assert list(chunks(5, vocabulary.CHUNK)) == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert list(chunks(5, vocabulary.CHUNK // 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(chunks(5, 2 * vocabulary.CHUNK)) == [slice(place, place + 1) for place in range(5)]
    assert not list(chunks(0, 7))


@pytest.mark.parametrize("rows", [7, 50])
def test_in_float32_it_is_torch_s_own(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Bit for bit, losses and gradient, whether or not there are several chunks."""
    monkeypatch.setattr(vocabulary, "CHUNK", rows * 300)
    logits, tokens = _inputs(torch.float32)
    weights = torch.linspace(0, 1, 50)
    losses = cross_entropy(logits, tokens)
    (slope,) = torch.autograd.grad((weights * losses).sum(), logits)
    expected = functional.cross_entropy(logits, tokens, reduction="none")
    (expected_slope,) = torch.autograd.grad((weights * expected).sum(), logits)
    assert torch.equal(losses, expected) and torch.equal(slope, expected_slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_lose_nothing_more(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", 4 * 300)
    logits, tokens = _inputs(dtype)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        losses = cross_entropy(logits, tokens)
    assert losses.dtype == torch.float32
    assert not any(tensor.dtype == torch.float32 and tensor.numel() > 50 for tensor in held), "a copy of the logits"
    exact = functional.cross_entropy(logits.double(), tokens, reduction="none")
    assert ((losses - exact).abs() / exact.clamp(min=1e-3)).max() < 1e-5
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    (expected,) = torch.autograd.grad(exact.sum(), logits)
    torch.testing.assert_close(slope, expected)
