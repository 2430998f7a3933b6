"""From a probe's decision value to a score in 0..1, and the threshold that holds a false-positive rate."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binom

from casa_mech.errors import InputError
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import rate_interval

_LEAST_SLOPE = 1e-3
"""A probe that knows nothing gets scores that are nearly equal, in their order still."""


@dataclass(frozen=True)
class Sigmoid:
    """Platt's calibration: score = 1 / (1 + exp(-(slope · decision + offset)))."""

    slope: float
    offset: float

    @classmethod
    def fit(cls, decisions: np.ndarray, labels: np.ndarray) -> Sigmoid:
        """Fitted to `decisions` [n] of prompts that the probe had not seen, and labels bool [n]; both classes count
        alike.

        With Platt's smoothed targets, (n + 1) / (n + 2) for a class of n, so that classes wide apart get no certainty
        that so few prompts cannot give.
        """
        positive, negative = int(labels.sum()), int((~labels).sum())
        targets = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
        weights = np.where(labels, 0.5 / positive, 0.5 / negative)

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            logits = values[0] * decisions + values[1]
            terms = np.logaddexp(0, logits) - targets * logits
            slopes = weights * (expit(logits) - targets)
            return float(weights @ terms), np.array([slopes @ decisions, slopes.sum()])

        bounds = [(_LEAST_SLOPE, None), (None, None)]
        slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=bounds, method="L-BFGS-B", tol=1e-12).x
        return cls(float(slope), float(offset))

    def __call__(self, decisions: np.ndarray) -> np.ndarray:
        """Scores [...] of decision values [...]."""
        return np.asarray(expit(self.slope * np.asarray(decisions, dtype=np.float64) + self.offset))


@dataclass(frozen=True)
class Threshold:
    """The score above which a prompt is flagged, for a false-positive rate; `float(threshold)` is its value."""

    value: float
    """Above it, a prompt is flagged."""
    low: float
    """The 95 % interval of the score that `1 - fpr` of all benign prompts lie below: from the order of the scores, with
    each topic counted as one draw. 1 where there are too few for an upper end."""
    high: float
    fpr: float
    """The rate that was asked for."""
    flagged: Estimate
    """The share of these benign prompts that it flags, over topics."""
    n: int
    """Benign prompts; `topics` are the independent draws among them."""
    topics: int

    @property
    def enough(self) -> bool:
        """False where so few benign prompts cannot show so low a rate: fewer than `1 / fpr - 1` topics."""
        return self.topics + 1 >= 1 / self.fpr - 1e-9

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        text = (
            f"flagged above {Estimate(self.value, self.low, self.high).text('.3f')} for a false-positive rate of "
            f"{self.fpr:g}; of {self.n} benign prompts it flags {self.flagged.percent()} %"
        )
        if self.enough:
            return text
        least = 1 / (self.topics + 1)
        return f"{text}. {self.topics} topics cannot show a rate below {least:.2g}: it is the highest of them"


def threshold_at(fpr: float, scores: np.ndarray, clusters: Sequence[Hashable], seed: int = 0) -> Threshold:
    """The least threshold that a new benign prompt passes with probability at most `fpr`, from benign `scores` [n].

    It is the score that `(n + 1) fpr` of them reach (a conformal quantile): exact whatever their distribution, as long
    as new prompts come from the same. With too few prompts it is their highest score, and `Threshold.enough` is False.

    Raises:
        InputError: a rate that is not between 0 and 1, or no benign prompt.
    """
    if not 0 < fpr < 1:
        raise InputError(f"fpr={fpr}: a false-positive rate lies between 0 and 1, such as 0.01")
    n, topics = len(scores), len(set(clusters))
    if not n:
        raise InputError("a threshold takes benign prompts: give benign=[...]")
    ordered = np.sort(scores)
    passing = int(fpr * (n + 1) + 1e-9)
    value = float(ordered[n - max(1, passing)])
    share = 1 - fpr
    below, above = binom.ppf(0.025, topics, share) / topics, (binom.ppf(0.975, topics, share) + 1) / topics
    low = float(ordered[max(0, int(np.ceil(below * n)) - 1)]) if below > 0 else 0.0
    high = float(ordered[int(np.ceil(above * n)) - 1]) if above <= 1 else 1.0
    flagged = rate_interval(scores > value, list(clusters), seed)
    return Threshold(value, min(low, value), max(high, value), fpr, flagged, n, topics)
