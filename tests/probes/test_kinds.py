"""Leaving a kind out: what is shared by all kinds of harm carries over, what belongs to one kind does not."""

import numpy as np
import pytest
from helpers.activations import activations

from casa_mech.errors import InputError
from probes.linear.kinds import ALL, left_out_kinds
from probes.linear.separability import transfer_matrix

HARMS, GOODS, TOPICS, EACH = 5, 6, 6, 4
KIND = np.repeat(np.arange(HARMS + GOODS), TOPICS * EACH)
HARMFUL = KIND < HARMS
NAMES = np.repeat([f"t{number}" for number in range((HARMS + GOODS) * TOPICS)], EACH)
KINDS = np.array([f"harm{kind}" if kind < HARMS else f"good{kind}" for kind in KIND])


def by_kind(shared: float, own: float, seed: int = 0) -> np.ndarray:
    """States: `shared` along one axis where harmful, `own` along an axis of each kind's own, noise 1."""
    states = np.random.default_rng(seed).standard_normal((len(KIND), 1 + HARMS + GOODS))
    states[:, 0] += shared * HARMFUL
    states[np.arange(len(KIND)), 1 + KIND] += own
    return states


def test_a_kind_s_own_direction_does_not_carry_over() -> None:
    data = activations({"text": by_kind(0, 6)}, HARMFUL, NAMES, KINDS)
    rows = left_out_kinds(data).set_index("kind")["auroc"]
    assert set(rows.index) == {ALL, *(f"harm{kind}" for kind in range(HARMS))}
    assert rows[ALL] < 0.65
    # With topics alone held out, the same states tell harm without a mistake.
    assert transfer_matrix(data)["auroc"].item() > 0.99


def test_a_shared_direction_carries_over_on_every_surface() -> None:
    data = activations({"text": by_kind(5, 0), "image": by_kind(5, 0, seed=1)}, HARMFUL, NAMES, KINDS)
    table = left_out_kinds(data)
    assert (table["auroc"] > 0.95).all() and set(table["surface"]) == {"text", "image"}
    counts = table.set_index(["surface", "kind"])["n"]
    assert counts["text", ALL] == len(KIND)
    # A kind is judged against the benign kinds of its own fold, at least one and not all.
    assert all(counts["image", f"harm{kind}"] < len(KIND) for kind in range(HARMS))
    assert sum(counts["text", f"harm{kind}"] for kind in range(HARMS)) == len(KIND)


def test_one_kind_alone_is_told_apart_from_the_others() -> None:
    """The last kind of harm has nothing of what the others share: it is the one that a probe misses."""
    states = by_kind(5, 0)
    states[HARMS - 1 == KIND, 0] -= 5
    rows = left_out_kinds(activations({"text": states}, HARMFUL, NAMES, KINDS)).set_index("kind")["auroc"]
    assert rows[f"harm{HARMS - 1}"] == pytest.approx(0.5, abs=0.2)
    assert (rows[[f"harm{kind}" for kind in range(HARMS - 1)]] > 0.95).all()


def test_too_few_kinds_are_named() -> None:
    two = np.where(HARMFUL, "harm" + (KIND % 2).astype(str).astype(object), KINDS)
    with pytest.raises(InputError, match="takes 3 categories of each label, not 2"):
        left_out_kinds(activations({"text": by_kind(5, 0)}, HARMFUL, NAMES, two))
