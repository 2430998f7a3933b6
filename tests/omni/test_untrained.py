"""The untrained control: the same shapes and processor, other weights, and the trained model left as it is."""

from __future__ import annotations

import torch

from casa_mech.omni import Omni
from casa_mech.omni.untrained import untrained
from casa_mech.queries import Query


def test_weights_are_drawn_anew_and_nothing_else_differs(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    before = {name: weight.clone() for name, weight in tiny_omni.model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    control, again, other = (untrained(tiny_omni, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    drawn = control.model.state_dict()
    assert {name: weight.shape for name, weight in drawn.items()} == {name: w.shape for name, w in before.items()}
    assert control.processor is tiny_omni.processor and control.dtype == tiny_omni.dtype
    assert control.fingerprint() == again.fingerprint() != other.fingerprint()
    assert not torch.equal(drawn["lm_head.weight"], before["lm_head.weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_omni.model.state_dict().items())
    with torch.no_grad():
        assert torch.isfinite(control.model(**control.encode(mixed_queries).inputs).logits).all()
