"""Intervals, tests and rate arithmetic. statsmodels and scikit-learn do the mathematics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

from casa_mech.errors import InputError
from casa_mech.queries import Query


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the fraction `k / n`, as fractions within 0..1."""
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0 or not 0 <= k <= n:
        raise InputError(f"a rate needs n above 0 and k between 0 and n; got k={k}, n={n}")
    low, high = proportion_confint(int(k), int(n), alpha=1 - level, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def cluster_of(query: Query) -> Hashable:
    """What counts as one independent draw: queries about the same topic belong together, others stand alone."""
    return query.meta.get("topic") or query.id


def auroc(scores: Sequence[float], labels: Sequence[int | bool]) -> float:
    """Area under the ROC curve of `scores` `[n]` for `labels` `[n]` (1 = harmful)."""
    from sklearn.metrics import roc_auc_score

    values, truth = _checked(scores, labels)
    return float(roc_auc_score(truth, values))


def auroc_interval(
    scores: Sequence[float],
    labels: Sequence[int | bool],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """(AUROC, low, high) with a percentile bootstrap over clusters (each item its own cluster when None).

    A resample draws as many clusters as there are, with replacement; resamples without both classes are drawn again.
    InputError when the data hold one class only, or when lengths differ.
    """
    from sklearn.metrics import roc_auc_score

    values, truth = _checked(scores, labels)
    groups = list(range(len(values))) if clusters is None else list(clusters)
    if len(groups) != len(values):
        raise InputError(f"{len(values)} scores but {len(groups)} clusters: give one cluster a score")
    index = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    member = np.array([index[name] for name in groups])
    rng = np.random.default_rng(seed)
    drawn = np.empty(0)
    for _ in range(20):
        picks = rng.integers(len(index), size=(resamples, len(index)))
        counts = np.stack([np.bincount(pick, minlength=len(index)) for pick in picks])[:, member]
        found = _weighted_auroc(values, truth, counts)
        drawn = np.concatenate([drawn, found[np.isfinite(found)]])[:resamples]
        if len(drawn) == resamples:
            break
    if len(drawn) < resamples:
        raise InputError(f"too few clusters ({len(index)}) of each class for a bootstrap: add data")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(roc_auc_score(truth, values)), float(low), float(high)


def _weighted_auroc(values: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC [resample] of `values` [n] under each row of `weights` [resample, n]; NaN where a class has no weight.

    The same as scikit-learn's with sample weights, for all resamples at once: the share of pairs in which the harmful
    one scores higher, ties counted half.
    """
    place = np.unique(values, return_inverse=True)[1]
    at = np.eye(place.max() + 1)[place]
    harmful, benign = (weights * (truth == 1)) @ at, (weights * (truth == 0)) @ at
    below = np.cumsum(benign, axis=1) - benign / 2
    with np.errstate(invalid="ignore"):
        return (harmful * below).sum(axis=1) / (harmful.sum(axis=1) * benign.sum(axis=1))


def _checked(scores: Sequence[float], labels: Sequence[int | bool]) -> tuple[np.ndarray, np.ndarray]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(int)
    if values.shape != truth.shape or values.ndim != 1:
        raise InputError(f"scores {values.shape} and labels {truth.shape} must be two lists of one length")
    if len(np.unique(truth)) != 2:
        raise InputError("an AUROC needs both classes: give harmful and benign queries")
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} scores are not finite numbers")
    return values, truth


@dataclass(frozen=True)
class McNemar:
    """Two systems on the same queries: how often only the first and only the second was right, and the exact p."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test on paired outcomes `[n]`."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(f"McNemar's test compares the same queries: got outcomes of shape {a.shape} and {b.shape}")
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    # Without a discordant pair statsmodels divides by nothing; the exact p is then 1 by definition.
    p_value = 1.0 if not table[0][1] + table[1][0] else float(test(table, exact=True).pvalue)
    return McNemar(table[0][1], table[1][0], p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p values, in their order."""
    from statsmodels.stats.multitest import multipletests

    if not len(p_values):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # log(0) inside statsmodels for p = 1
        return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def possible_counts(percent: float | str, n: int, decimals: int = 1) -> list[int]:
    """The counts k for which 100 k / n, rounded to `decimals` (halves up), is the published `percent`."""
    target = _rounded(Decimal(str(percent)), decimals)
    near = float(target) * n / 100
    reach = n / 100 * 10**-decimals + 1
    lowest, highest = max(0, math.floor(near - reach)), min(n, math.ceil(near + reach))
    return [k for k in range(lowest, highest + 1) if _rounded(Decimal(100 * k) / n, decimals) == target]


def smallest_n(percents: Iterable[float | str], up_to: int = 1000, decimals: int = 1) -> list[int]:
    """All n up to `up_to` of which every published rate can be a count; the first is the smallest set that fits."""
    rates = list(percents)
    return [n for n in range(1, up_to + 1) if all(possible_counts(rate, n, decimals) for rate in rates)]


def _rounded(value: Decimal, decimals: int) -> Decimal:
    return value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP)
