"""Refusal tokens (arXiv 2412.06748): a token before the reply, with a threshold on its probability at test time.

The token is trained as in `ssft-token`, whose folders it loads. The threshold trades attack success for over-refusal
without training again; `control_curve` draws that trade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from casa_mech.defenses.safety_token import SafetyTokenDefense, SafetyTokenSettings
from casa_mech.errors import InputError
from casa_mech.judging.stats import wilson


class RefusalTokenSettings(SafetyTokenSettings):
    """How refusal tokens are used."""

    threshold: float = Field(default=0.5, ge=0, le=1)
    """The unsafe token is taken where its share of the two tokens' probability is above this; 0.5 is the likelier
    token, 1 never refuses."""


class RefusalToken(SafetyTokenDefense):
    """The unsafe token as a refusal token, taken above a threshold."""

    name = "refusal-token"
    source = "refusal tokens, arXiv 2412.06748"
    settings_type = RefusalTokenSettings

    def _use(self) -> dict[str, Any]:
        assert isinstance(self.settings, RefusalTokenSettings)
        return super()._use() | {"threshold": self.settings.threshold}


@dataclass(frozen=True)
class ControlPoint:
    """One threshold of the control curve."""

    threshold: float
    """The share of the two tokens' probability above which the unsafe one is taken."""
    attack_success: float
    """Share of harmful queries that get a complying reply."""
    attack_interval: tuple[float, float]
    """Its 95 % Wilson interval."""
    over_refusal: float
    """Share of benign queries that are refused."""
    refusal_interval: tuple[float, float]
    """Its 95 % Wilson interval."""
    n_harmful: int
    """Number of harmful queries."""
    n_benign: int
    """Number of benign queries."""


def control_curve(
    scores: Sequence[float],
    harmful: Sequence[bool],
    passed: Sequence[bool] | None = None,
    flagged: Sequence[bool] | None = None,
    thresholds: Sequence[float] | None = None,
) -> list[ControlPoint]:
    """Attack success and over-refusal at each threshold, from one scoring of the queries.

    A query with a score above the threshold gets the unsafe token, any other the safe one. What follows a token does
    not depend on the threshold, so two generations a query (at the thresholds 1 and 0) give the curve exactly.

    Args:
        scores: the unsafe token's share for each query (`RefusalToken.scores`).
        harmful: True for the harmful queries.
        passed: True where the reply after the safe token counts against the defence: it complies with a harmful query,
            or refuses a benign one. None: every harmful query succeeds once passed, no benign one is refused.
        flagged: the same after the unsafe token. None: everything flagged is refused.
        thresholds: default, every score at which something changes, and 0 and 1.

    Raises:
        InputError: lists of different lengths, a score that is not finite, or no harmful or no benign query.
    """
    values, truth = np.asarray(scores, dtype=float), np.asarray(harmful, dtype=bool)
    after_safe = truth if passed is None else np.asarray(passed, dtype=bool)
    after_unsafe = ~truth if flagged is None else np.asarray(flagged, dtype=bool)
    if not len(values) == len(truth) == len(after_safe) == len(after_unsafe):
        raise InputError("scores, harmful, passed and flagged must be of one length, a value for each query")
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"scores[{index}] is {values[index]}: no threshold tells it apart; score the query again")
    if truth.all() or not truth.any():
        raise InputError(f"a control curve needs harmful and benign queries; all {len(truth)} given are of one class")
    levels = sorted({0.0, 1.0, *values.tolist()}) if thresholds is None else thresholds
    return [_point(level, np.where(values > level, after_unsafe, after_safe), truth) for level in levels]


def _point(threshold: float, failed: np.ndarray, harmful: np.ndarray) -> ControlPoint:
    n_harmful, n_benign = int(harmful.sum()), int((~harmful).sum())
    attacks, refusals = int(failed[harmful].sum()), int(failed[~harmful].sum())
    return ControlPoint(
        threshold=threshold,
        attack_success=attacks / n_harmful,
        attack_interval=wilson(attacks, n_harmful),
        over_refusal=refusals / n_benign,
        refusal_interval=wilson(refusals, n_benign),
        n_harmful=n_harmful,
        n_benign=n_benign,
    )
