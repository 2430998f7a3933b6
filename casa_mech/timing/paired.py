"""Sides that do the same work, timed in one process and taking turns: what every benchmark here rests on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Side = Callable[[], object]
BATCH = 16
"""Requests in the batch that the sides of a benchmark work on."""
REPLY_TOKENS = 24
"""Tokens of every timed reply, whatever the model would say."""


def seconds(call: Side, device: torch.device | None = None) -> float:
    """Seconds that one call takes, a GPU's queued work included."""
    began = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def take_turns(sides: Sequence[Side], rounds: int, device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each side, a tuple a round; one more round goes before them to warm up."""
    return [tuple(seconds(side, device) for side in sides) for _ in range(rounds + 1)][1:]


def time_ratio(
    names: tuple[str, str],
    sides: tuple[Side, Side],
    repeats: int,
    device: torch.device,
    allowed: float | None = None,
) -> dict[str, float]:
    """Median seconds of two sides that take turns and the first's ratio to the second, as `ratio`.

    Args:
        names: of the sides; the seconds are called after them.
        sides: calls that do the same work.
        repeats: rounds.
        device: what they run on.
        allowed: the most that the ratio is meant to be, stated beside it.
    """
    one, other = (median(side) for side in zip(*take_turns(sides, repeats, device), strict=True))
    measured = dict(zip((f"{name}_seconds" for name in names), (round(one, 4), round(other, 4)), strict=True))
    return {**measured, "ratio": round(one / other, 3), **({} if allowed is None else {"allowed": round(allowed, 3)})}
