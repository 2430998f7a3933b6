"""KL against scipy, what is masked, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from casa_mech.divergence import kl_divergence, kl_from_logits
from casa_mech.errors import InputError


def test_kl_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 5, 11, generator=generator)
    expected = entropy(base.softmax(-1).numpy(), other.softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(kl_from_logits(base, other), expected, rtol=1e-5)
    assert torch.equal(kl_from_logits(base, base), torch.zeros(5))
    masked = base.clone()
    masked[:, 0] = -torch.inf
    assert kl_from_logits(masked, other).isfinite().all()
    with pytest.raises(InputError, match="one shape"):
        kl_from_logits(base, other[:, :4])
    with pytest.raises(InputError, match="not finite"):
        kl_from_logits(base * torch.nan, other)


def test_kl_of_several_predictions_against_one() -> None:
    logits = torch.randn((4, 5, 11), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    each = torch.stack([kl_divergence(logits[0], logits[site]) for site in range(4)])
    assert torch.equal(kl_divergence(logits[0], logits), each)
