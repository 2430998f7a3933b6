"""Seconds a query: a defence and the plain model answer the same queries at equal length, taking turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from casa_mech.defenses import Defense
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query
from casa_mech.timing.paired import REPLY_TOKENS, take_turns

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

    Every reply has exactly `REPLY_TOKENS` tokens, so that one which refuses in few words is not cheaper for that; what
    a defence does besides (a verdict, a caption, a probe) is in its time, what it does once is not.

    Args:
        defense: on a model of its own, or on `plain` where it leaves the weights alone.
        plain: the model without any defence.
        queries: groups that are answered in one batch each.
        rounds: how often; one more round goes before them to warm up.
    """
    settings = GenerationSettings(max_new_tokens=REPLY_TOKENS, batch_size=max(len(group) for group in queries))

    def defended() -> None:
        for group in queries:
            defense.generate(group, settings)

    def undefended() -> None:
        for group in queries:
            plain.generate(group, settings)

    with _endless(defense.omni), _endless(plain):
        times = take_turns((defended, undefended), rounds, plain.device)
    n = sum(len(group) for group in queries)
    ratios = [own / other for own, other in times]
    own, other = (median(side) / n for side in zip(*times, strict=True))
    return Timing(own, other, median(ratios), min(ratios), max(ratios), n * rounds)


@contextmanager
def _endless(omni: Omni) -> Iterator[None]:
    """The model without an end of turn, so that every reply is as long as the settings allow."""
    config = omni.model.generation_config
    end, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = end
