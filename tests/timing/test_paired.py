"""What every benchmark rests on: sides that take turns, and the ratio of their medians."""

import pytest
import torch

from casa_mech.errors import InputError
from casa_mech.timing import paired
from casa_mech.timing.paired import take_turns, time_ratio
from casa_mech.timing.parts import PARTS, measure_parts

CPU = torch.device("cpu")


def test_sides_take_turns_after_a_round_that_does_not_count() -> None:
    calls: list[str] = []
    times = take_turns([lambda: calls.append("a"), lambda: calls.append("b")], 2, CPU)
    assert calls == ["a", "b"] * 3
    assert len(times) == 2 and all(len(round_) == 2 and min(round_) >= 0 for round_ in times)


def test_the_ratio_is_of_medians_and_the_allowed_one_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lasting = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 2.0, 8.0])
    monkeypatch.setattr(paired, "seconds", lambda *_: next(lasting))
    found = time_ratio(("ours", "theirs"), (int, int), 3, CPU, 1 / 3)
    assert found == {"ours_seconds": 2.0, "theirs_seconds": 4.0, "ratio": 0.5, "allowed": 0.333}


def test_parts_are_measured_each_on_a_model_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []

    def measure(omni: object, repeats: int) -> dict[str, object]:
        measured.append(omni)
        return {"rounds": repeats}

    for name in PARTS:
        monkeypatch.setitem(PARTS, name, measure)
    sections = measure_parts(["all"], "organism", 2, "cpu")
    assert list(sections) == ["model", "repeats", "rounds", "defenses", "probes", "lens", "prefill"]
    assert len({id(omni) for omni in measured}) == len(PARTS)
    with pytest.raises(InputError, match="no benchmark 'speed'"):
        measure_parts(["gate", "speed"])
