"""Seconds a query: a defence and the plain model answer the same queries at equal length, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from casa_mech.defenses import Defense
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query

TIMED_TOKENS = 24
TIMED_QUERIES = 16
TIMED_ATTACKS = ("plain", "image", "audio")


@dataclass(frozen=True)
class Timing:
    """Time of a defence's replies beside the plain model's."""

    seconds: float
    """Seconds a query with the defence, median over rounds."""
    plain_seconds: float
    """Seconds a query without it, median over rounds."""
    ratio: float
    """Median over rounds of the two sides' ratio."""
    low: float
    """The least ratio of a round."""
    high: float
    """The greatest ratio of a round."""
    n: int
    """Timed queries, all rounds together."""


def relative_seconds(defense: Defense, plain: Omni, queries: Sequence[Sequence[Query]], rounds: int) -> Timing:
    """Seconds with `defense` and with `plain`, which take turns, and their ratio.

    Every reply has exactly `TIMED_TOKENS` tokens, so that one which refuses in few words is not cheaper for that; what
    a defence does besides (a verdict, a caption, a probe) is in its time, what it does once is not.

    Args:
        defense: on a model of its own, or on `plain` where it leaves the weights alone.
        plain: the model without any defence.
        queries: groups that are answered in one batch each.
        rounds: how often; one more round goes before them to warm up.
    """
    settings = GenerationSettings(max_new_tokens=TIMED_TOKENS, batch_size=max(len(group) for group in queries))
    sides: tuple[Callable[..., object], ...] = (defense.generate, plain.generate)
    times: list[tuple[float, ...]] = []
    with _endless(defense.omni), _endless(plain):
        for _ in range(rounds + 1):
            times.append(tuple(_seconds(side, queries, settings, plain.device) for side in sides))
    n = sum(len(group) for group in queries)
    ratios = [one / other for one, other in times[1:]]
    one, other = (median(side) / n for side in zip(*times[1:], strict=True))
    return Timing(one, other, median(ratios), min(ratios), max(ratios), n * rounds)


def _seconds(
    answer: Callable[..., object],
    queries: Sequence[Sequence[Query]],
    settings: GenerationSettings,
    device: torch.device,
) -> float:
    began = time.perf_counter()
    for group in queries:
        answer(group, settings)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextmanager
def _endless(omni: Omni) -> Iterator[None]:
    """The model without an end of turn, so that every reply is as long as the settings allow."""
    config = omni.model.generation_config
    end, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = end
