"""No two purposes draw the same requests."""

from itertools import pairwise

from casa_mech.draws import BENIGN, Draw


def test_purposes_lie_a_thousand_seeds_apart_for_either_label() -> None:
    starts = sorted([*Draw, *(purpose + BENIGN for purpose in Draw if purpose is not Draw.TRAINING)])
    assert len(set(starts)) == len(starts)
    assert all(later - earlier >= 1_000 for earlier, later in pairwise(starts))
