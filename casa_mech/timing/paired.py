"""Two sides of a comparison, timed in one process with turns taken: the ratio every benchmark here reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from casa_mech.omni import Omni

BATCH = 16


REPLY_TOKENS = 24


def time_ratio(
    first: str,
    second: str,
    sides: tuple[Callable[[], object], Callable[[], object]],
    repeats: int,
    omni: Omni,
    allowed: float | None = None,
) -> dict[str, float]:
    """Median seconds of two sides that take turns, and their ratio, with the one allowed if there is one."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for side, record in zip(sides, times, strict=True):
            record.append(seconds(side, omni.device))
    one, other = (median(record[1:]) for record in times)  # the first round warms up
    measured = {f"{first}_seconds": round(one, 4), f"{second}_seconds": round(other, 4)}
    measured["ratio"] = round(one / other, 3)
    return measured if allowed is None else {**measured, "allowed": allowed}


def seconds(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that one call takes, a GPU's queued work included."""
    began = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
