"""Intervals, tests and rate arithmetic. statsmodels and scikit-learn do the mathematics."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import bootstrap_interval, mean_interval, members
from casa_mech.queries import Query
from casa_mech.queries.overlap import normalised

if TYPE_CHECKING:
    import pandas as pd


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the fraction `k / n`, as fractions within 0..1."""
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0 or not 0 <= k <= n:
        raise InputError(f"a rate needs n above 0 and k between 0 and n; got k={k}, n={n}")
    low, high = proportion_confint(int(k), int(n), alpha=1 - level, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def cluster_of(item: Query | Mapping[str, Any]) -> Hashable:
    """What counts as one independent draw: queries about one topic, or that ask the same, belong together.

    `item` is a query or a row of a table of replies (`topic`, `meta`, `query_id`). All renderings of a query keep its
    id, so they are one draw, too.
    """
    if isinstance(item, Query):
        topic, request, own = item.meta.get("topic"), item.meta.get("request"), item.id
    else:
        topic, request, own = item.get("topic"), _meta(item.get("meta")).get("request"), item["query_id"]
    # An empty cell of a table can come back as NaN.
    return topic if isinstance(topic, str) and topic else normalised(request or "") or own


def _meta(cell: Any) -> Mapping[str, str]:
    return json.loads(cell) if isinstance(cell, str) and cell else cell if isinstance(cell, Mapping) else {}


def clusters_of(frame: pd.DataFrame) -> list[Hashable]:
    """`cluster_of` each row."""
    names = [name for name in ("topic", "query_id") if name in frame.columns]
    return [cluster_of(row) for row in frame[names].to_dict("records")]


def rate_interval(
    hits: Sequence[bool] | np.ndarray, clusters: Sequence[Hashable] | None = None, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(rate, low, high) of `hits` [n]: Wilson's interval where all draws are independent, else a cluster bootstrap.

    A rate of 0 or 1 has no spread to draw from; with clusters it gets Wilson's interval for as many draws as clusters.
    """
    taken = np.asarray(hits, dtype=bool)
    k, n = int(taken.sum()), len(taken)
    effective = n if clusters is None else len(set(clusters))
    if effective == n:
        return (k / n if n else math.nan), *wilson(k, n, level)
    if k in (0, n):
        return k / n, *wilson(effective if k else 0, effective, level)
    return mean_interval(taken, clusters, seed, level)


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
    values, truth = _checked(scores, labels)
    low, high = bootstrap_interval(
        lambda weights: _weighted_auroc(values, truth, weights), clusters, len(values), seed, level, resamples
    )
    return auroc(scores, labels), low, high


def fpr_at_tpr(scores: Sequence[float], labels: Sequence[int | bool], tpr: float = 0.95) -> float:
    """False-positive rate at the highest threshold that lets at least `tpr` of the harmful be flagged.

    `scores` `[n]`, `labels` `[n]` (1 = harmful); a query is flagged when its score reaches the threshold.
    """
    values, truth = _checked(scores, labels)
    return float(_weighted_fpr(values, truth, np.ones((1, len(values))), _share(tpr))[0])


def fpr_at_tpr_interval(
    scores: Sequence[float],
    labels: Sequence[int | bool],
    clusters: Sequence[Hashable] | None = None,
    tpr: float = 0.95,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """(false-positive rate, low, high); every resample of clusters has its own threshold."""
    values, truth = _checked(scores, labels)
    low, high = bootstrap_interval(
        lambda weights: _weighted_fpr(values, truth, weights, _share(tpr)),
        clusters,
        len(values),
        seed,
        level,
        resamples,
    )
    return fpr_at_tpr(scores, labels, tpr), low, high


def _share(tpr: float) -> float:
    if not 0 < tpr <= 1:
        raise InputError(f"a true-positive rate is above 0 and at most 1, not {tpr}")
    return tpr


def _sums(values: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the harmful and of the benign at each distinct value, rising: two arrays [resample, value]."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
    ranked, harmful = weights[:, order].astype(np.float64), truth[order] == 1
    return np.add.reduceat(ranked * harmful, starts, axis=1), np.add.reduceat(ranked * ~harmful, starts, axis=1)


def _weighted_auroc(values: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC [resample] of `values` [n] under each row of `weights` [resample, n]; NaN where a class has no weight.

    The same as scikit-learn's with sample weights, for all resamples at once: the share of pairs in which the harmful
    one scores higher, ties counted half.
    """
    harmful, benign = _sums(values, truth, weights)
    below = np.cumsum(benign, axis=1) - benign / 2
    with np.errstate(invalid="ignore"):
        return (harmful * below).sum(axis=1) / (harmful.sum(axis=1) * benign.sum(axis=1))


def _weighted_fpr(values: np.ndarray, truth: np.ndarray, weights: np.ndarray, tpr: float) -> np.ndarray:
    """False-positive rate [resample] at the highest threshold that flags `tpr` of the harmful weight."""
    harmful, benign = (np.cumsum(part[:, ::-1], axis=1) for part in _sums(values, truth, weights))
    with np.errstate(invalid="ignore"):
        # 1e-9: 0.95 of 20 is 19, also when the product says 19.000000000000004.
        enough = harmful >= tpr * harmful[:, -1:] - 1e-9
        rates = benign / benign[:, -1:]
    found = rates[np.arange(len(rates)), enough.argmax(axis=1)]
    return np.where(harmful[:, -1] > 0, found, np.nan)


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


def permutation_test(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 9999,
) -> float:
    """Two-sided p of a paired permutation test on the mean difference of `first` [n] and `second` [n].

    Under the null a cluster's two systems can be swapped: all its pairs change sides together. Exact where the clusters
    are few enough to go through all swaps, else with `resamples` random ones.
    """
    from scipy.stats import permutation_test as test

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(f"a paired test compares the same queries: got values of shape {a.shape} and {b.shape}")
    sums = np.bincount(members(clusters, len(a)), weights=a - b)
    sums = sums[np.abs(sums) > 1e-12]
    if not len(sums):
        return 1.0
    if len(sums) == 1:
        return 1.0  # one cluster, two swaps of equal size: scipy refuses, the answer is known
    with_zeros = (sums, np.zeros_like(sums))
    found = test(
        with_zeros, lambda x, y, axis: (x - y).sum(axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=resamples, batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


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
