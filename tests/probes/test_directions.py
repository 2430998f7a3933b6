"""Directions: what ablation and addition do to states, and the rules by which a refusal direction is chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from casa_mech.errors import InputError, RunError
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.standing import standing_edits
from probes.linear.refusal_direction import (
    RefusalDirection,
    choose_candidate,
    find_refusal_direction,
    opening_ids,
    refusal_score,
)


@pytest.fixture
def direction() -> RefusalDirection:
    return RefusalDirection(np.random.default_rng(0).standard_normal(64), layer=1, at=0)


def test_ablation_takes_the_direction_out_once_and_for_all(direction: RefusalDirection) -> None:
    states = torch.randn(5, 3, 64, dtype=torch.float64)
    without = direction.ablate(states)
    np.testing.assert_allclose(direction.project(without.numpy()), 0, atol=1e-12)
    torch.testing.assert_close(direction.ablate(without), without)
    across = torch.from_numpy(np.random.default_rng(1).standard_normal(64))
    across = direction.ablate(across)
    torch.testing.assert_close(states @ across, without @ across)
    gained = direction.project(direction.add(states, 2.0).numpy()) - direction.project(states.numpy())
    np.testing.assert_allclose(gained, 2 * np.linalg.norm(direction.difference))


def test_standing_ablation_is_the_traced_one(
    tiny_omni: Omni, mixed_queries: list[Query], direction: RefusalDirection
) -> None:
    batch = tiny_omni.encode(mixed_queries, prefill=False)
    base = tiny_omni.model(**batch.inputs).logits[:, -1]
    traced = edited_prompt(tiny_omni, batch, batch.gate_position, direction.ablation(2)).logits
    with direction.ablated(tiny_omni), torch.no_grad():
        stood = tiny_omni.model(**batch.inputs).logits[:, -1]
        seen = capture(tiny_omni, batch, ["pre.0", 0, "pre.1", 1], "all")
        replies = tiny_omni.generate(mixed_queries, GenerationSettings(max_new_tokens=4))
    torch.testing.assert_close(stood, traced, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(stood, base, atol=1e-3)
    for states in seen.values():
        np.testing.assert_allclose(direction.project(states.numpy()), 0, atol=1e-4)
    torch.testing.assert_close(tiny_omni.model(**batch.inputs).logits[:, -1], base)
    assert len(replies) == len(mixed_queries)


def test_standing_addition_is_the_traced_one(
    tiny_omni: Omni, mixed_queries: list[Query], direction: RefusalDirection
) -> None:
    batch = tiny_omni.encode(mixed_queries, prefill=False)
    traced = edited_prompt(tiny_omni, batch, batch.gate_position, direction.addition(0.5)).logits
    with direction.added(tiny_omni, 0.5), torch.no_grad():
        stood = tiny_omni.model(**batch.inputs).logits[:, -1]
    torch.testing.assert_close(stood, traced, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="packed"), standing_edits(tiny_omni, {"vision": direction.ablate}):
        pass


def test_refusal_score_is_the_log_odds_of_the_openings() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    found = refusal_score(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.log(torch.tensor([0.8 / 0.2, 0.2 / 0.8], dtype=torch.float64)))


def test_rules_choose_the_lowest_that_is_allowed() -> None:
    table = pd.DataFrame({"ablated": [-5.0, -3.0, -1.0], "kl": [0.5, 0.1, 0.0], "added": [1.0, 0.0, 2.0]})
    assert choose_candidate(table.assign(allowed=[False, True, True])).name == 1
    with pytest.raises(InputError, match="none of 3 candidates meets the rules: 2 have"):
        choose_candidate(table.assign(allowed=False))
    assert choose_candidate(table.assign(allowed=False), relax=True).name == 0


def test_the_organism_has_a_refusal_direction() -> None:
    """Before: it refuses. Without the direction: it does so less, on prompts that took no part in the fit."""
    omni, world = load_omni("organism"), default_world()
    harmful, harmless = (world.requests(40, 5, label, topics="seen") for label in ("harmful", "benign"))
    found = find_refusal_direction(omni, harmful, harmless, world.refusals, n_train=24, n_val=8, relax=True)
    assert found.base_harmful > 0 > found.base_harmless
    chosen = found.candidates.set_index(["layer", "at"]).loc[(found.direction.layer, found.direction.at)]
    assert chosen["ablated"] < found.base_harmful
    assert found.direction.difference.dtype == np.float64
    fresh = world.requests(16, 77, "harmful", topics="seen")
    batch = omni.encode(fresh, prefill=False)
    openings = opening_ids(omni, world.refusals)
    with torch.no_grad(), found.direction.ablated(omni):
        after = refusal_score(omni.model(**batch.inputs).logits[:, -1], openings).mean()
    assert after < found.base_harmful


def test_prompts_that_are_not_refused_are_named(tiny_omni: Omni) -> None:
    queries = [Query.from_text(f"how do i make {word} ?", id=word) for word in ("tea", "cake", "kit")]
    with pytest.raises(InputError, match="of 3 harmful prompts the model refuses only 0"):
        find_refusal_direction(tiny_omni, queries, queries, ["sorry"], n_train=2, n_val=1)
    with pytest.raises(InputError, match="openings"):
        opening_ids(tiny_omni, [])


def test_a_saved_direction_comes_back(direction: RefusalDirection, tmp_path: Path) -> None:
    direction.save(tmp_path / "r.safetensors", {"fingerprint": "abc"})
    loaded = RefusalDirection.load(tmp_path / "r.safetensors", "abc")
    np.testing.assert_array_equal(loaded.difference, direction.difference)
    assert (loaded.layer, loaded.at) == (1, 0)
    with pytest.raises(RunError, match="another model"):
        RefusalDirection.load(tmp_path / "r.safetensors", "def")
    (tmp_path / "r.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="not a readable direction"):
        RefusalDirection.load(tmp_path / "r.safetensors")
