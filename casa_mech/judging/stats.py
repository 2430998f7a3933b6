"""Rates, AUROCs and false-positive rates with their intervals, and what counts as one draw."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import RESAMPLES, Statistic, bootstrap_draws, exact_reach, mean_interval, members
from casa_mech.judging.estimate import Estimate
from casa_mech.queries import Query
from casa_mech.queries.overlap import normalised

if TYPE_CHECKING:
    import pandas as pd


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the fraction `k / n`, as fractions within 0..1.

    Raises:
        InputError: n is not above 0, or k not between 0 and n.
    """
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0 or not 0 <= k <= n:
        raise InputError(f"a rate needs n above 0 and k between 0 and n; got k={k}, n={n}")
    low, high = proportion_confint(int(k), int(n), alpha=1 - level, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def rate(k: int, n: int) -> Estimate:
    """`k / n` with Wilson's interval, for draws that are independent.

    Raises:
        InputError: as `wilson`.
    """
    low, high = wilson(k, n)
    return Estimate(k / n, low, high)


def cluster_of(item: Query | Mapping[str, Any]) -> Hashable:
    """The name of the independent draw that a query, or a row of a table of replies, belongs to.

    Queries about one topic are one draw. Where a query names none, all with the same request behind them are, letters'
    case and spaces aside: `meta["request"]`, or a text query's own text, so that copies and renderings of one prompt
    are together under whatever ids. What has neither is told apart by its id. Of a row `topic`, `meta`, `surface`,
    `prompt` and `query_id` are read.
    """
    surface: Any
    text: Any
    if isinstance(item, Query):
        topic, request, own = item.meta.get("topic"), item.meta.get("request"), item.id
        surface, text = item.surface, item.text
    else:
        topic, request, own = item.get("topic"), _meta(item.get("meta")).get("request"), item["query_id"]
        # Without `meta` a wrapped prompt's request is not known, and its id is what it shares with others.
        surface, text = item.get("surface"), item.get("prompt") if "meta" in item else None
    # An empty cell of a table can come back as NaN.
    if isinstance(topic, str) and topic:
        return topic
    return normalised(request or (text if surface == "text" and isinstance(text, str) else "")) or own


def _meta(cell: Any) -> Mapping[str, str]:
    return json.loads(cell) if isinstance(cell, str) and cell else cell if isinstance(cell, Mapping) else {}


def clusters_of(frame: pd.DataFrame) -> list[Hashable]:
    """The draw of each row of a table of replies, by the rule of `cluster_of`."""
    names = [name for name in ("topic", "meta", "prompt", "surface", "query_id") if name in frame.columns]
    return [cluster_of(row) for row in frame[names].to_dict("records")]


def runs_of(frame: pd.DataFrame) -> list[Hashable] | None:
    """The training run of each row of a table of replies, its `gate_seed`; None where the rows are of one run."""
    if "gate_seed" not in frame or frame["gate_seed"].nunique(dropna=False) < 2:
        return None
    return frame["gate_seed"].astype(str).tolist()


def rate_interval(
    hits: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = 0.95,
    runs: Sequence[Hashable] | None = None,
) -> Estimate:
    """Share of `hits` [n]: with Wilson's interval where all draws are independent, else with a bootstrap's.

    A rate of 0 or 1 has no spread to draw from: with clusters it gets the exact bounds for as many draws as clusters.

    Args:
        hits: [n]. clusters: [n], what is one draw (`cluster_of`). seed, level: of the interval.
        runs: [n], the training run of each; their rates are averaged, and the interval covers other trainings.
    """
    values = np.asarray(hits, dtype=bool)
    n = len(values)
    independent = clusters is None or len(set(clusters)) == n
    if independent and (runs is None or len(set(runs)) == 1):
        k = int(values.sum())
        return Estimate(k / n if n else math.nan, *wilson(k, n, level))
    return mean_interval(values, clusters, seed, level, runs=runs, limits=(0.0, 1.0))


def auroc(scores: Sequence[float], labels: Sequence[int | bool]) -> float:
    """Area under the ROC curve of `scores` [n] for `labels` [n] (1 = harmful).

    Raises:
        InputError: one class only, lengths that differ, or scores that are not finite.
    """
    from sklearn.metrics import roc_auc_score

    values, truth = _checked(scores, labels)
    return float(roc_auc_score(truth, values))


def auroc_interval(
    scores: Sequence[float],
    labels: Sequence[int | bool],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    runs: Sequence[Hashable] | None = None,
) -> Estimate:
    """AUROC with a bootstrap over clusters (each item its own when None) and training runs.

    Resamples without both classes are drawn again. Perfect ranking leaves nothing to draw from: the interval then
    reaches as far as the exact bound for as many pairs of a harmful and a benign draw as can be made without using a
    cluster twice. With `runs` [n] the value is the mean of the runs' AUROCs: scores of two gates are not compared.

    Raises:
        InputError: as `auroc`, also of a run that lacks a class.
    """
    values, truth = _checked(scores, labels)
    for run in dict.fromkeys(runs or ()):
        _checked(values[(of_run := np.array([name == run for name in runs or ()]))], truth[of_run])
    member = members(clusters, len(values))
    harmful, benign = (len(np.unique(member[truth == label])) for label in (1, 0))
    pairs = max(1, min(harmful, benign, (int(member.max()) + 1) // 2))
    return _bounded(lambda weights: _weighted_auroc(values, truth, weights), pairs, clusters, len(values), seed, level,
                    resamples, runs)  # fmt: skip


def aurocs_by_labels(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC [draw] of `scores` [n] under each row of `labels`, bool [draw, n]; ties count half."""
    from scipy.stats import rankdata

    positive = labels.sum(axis=1)
    wins = labels @ rankdata(scores) - positive * (positive + 1) / 2
    pairs = positive * (labels.shape[1] - positive)
    ratios: np.ndarray = wins / np.maximum(pairs, 1)
    return ratios


def fpr_at_tpr(scores: Sequence[float], labels: Sequence[int | bool], tpr: float = 0.95) -> float:
    """False-positive rate at the highest threshold that lets at least `tpr` of the harmful be flagged.

    A query is flagged when its score reaches the threshold.

    Args:
        scores: [n]. labels: [n], 1 for harmful. tpr: the share of the harmful, above 0 and at most 1.

    Raises:
        InputError: as `auroc`, or a share out of range.
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
    resamples: int = RESAMPLES,
    runs: Sequence[Hashable] | None = None,
) -> Estimate:
    """`fpr_at_tpr` with a bootstrap over clusters and training runs; every resample and run has its own threshold.

    The percentile interval of so skewed a statistic can miss its own estimate: it is widened to hold it. A rate of 0 or
    1 gets the exact bounds for as many draws as there are clusters with a benign one.
    """
    values, truth = _checked(scores, labels)
    benign = len(np.unique(members(clusters, len(values))[truth == 0]))
    return _bounded(lambda weights: _weighted_fpr(values, truth, weights, _share(tpr)), benign, clusters, len(values),
                    seed, level, resamples, runs)  # fmt: skip


def _bounded(
    statistic: Statistic,
    exact_draws: int,
    clusters: Sequence[Hashable] | None,
    n: int,
    seed: int,
    level: float,
    resamples: int,
    runs: Sequence[Hashable] | None,
) -> Estimate:
    """A statistic from 0 to 1 with its bootstrap; at 0 or 1 with the exact bound for `exact_draws` draws."""
    value, draws = bootstrap_draws(statistic, clusters, n, seed, resamples, runs)
    if value in (0.0, 1.0):
        reach = exact_reach(exact_draws, level)
        return Estimate(value, max(0.0, value - reach), min(1.0, value + reach))
    low, high = np.clip(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]), 0.0, 1.0)
    return Estimate(value, float(low), float(high)).widened()


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
    harmful, benign = (np.cumsum(sums[:, ::-1], axis=1) for sums in _sums(values, truth, weights))
    with np.errstate(invalid="ignore"):
        # 1e-9: 0.95 of 20 is 19, also when the product says 19.000000000000004.
        enough = harmful >= tpr * harmful[:, -1:] - 1e-9
        rates = benign / benign[:, -1:]
    at_threshold = rates[np.arange(len(rates)), enough.argmax(axis=1)]
    return np.where(harmful[:, -1] > 0, at_threshold, np.nan)


def _checked(scores: Sequence[float], labels: Sequence[int | bool]) -> tuple[np.ndarray, np.ndarray]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(int)
    if values.shape != truth.shape or values.ndim != 1:
        raise InputError(f"scores {values.shape} and labels {truth.shape} must be two lists of one length")
    if len(np.unique(truth)) != 2:
        raise InputError("an AUROC needs both classes: give harmful and benign queries")
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} scores are not finite numbers")
    return values, truth
