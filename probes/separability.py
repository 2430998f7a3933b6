"""Are harmful and benign requests separable in the hidden states, at which layer, and across modalities?

The measures of the method specification's section 6: PCA with explained variance and silhouette, five-fold logistic
probes, a shrinkage Fisher ratio, a permutation baseline, and the transfer of a probe from one modality to another.
Folds keep a topic together, so a probe is always judged on topics that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, silhouette_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from casa_mech.errors import InputError
from casa_mech.judging import auroc_interval
from probes.activations import Activations

Scorer = Callable[[np.ndarray], np.ndarray]
PENALTIES = (0.003, 0.3)
"""Inverse strengths of the probe's L2 penalty that are tried; the choice is made on the training folds only."""

RESAMPLES = 200
"""Bootstrap draws for a probe's interval."""


@dataclass(frozen=True)
class Plane:
    """A two-dimensional view of hidden states.

    points: [query, 2]. explained: the two components' shares of the variance. silhouette: of the two classes, in the
    plane, from -1 to 1; one number for each surface.
    """

    points: np.ndarray
    explained: tuple[float, float]
    silhouette: dict[str, float]


@dataclass(frozen=True)
class ProbeResult:
    """A probe's AUROC on topics that it was not fitted on, with its interval (bootstrap over topics)."""

    auroc: float
    low: float
    high: float
    n: int


def pca_plane(activations: Activations, site: str) -> Plane:
    """PCA of all queries at `site`, so that the surfaces share one plane.

    Raises:
        InputError: fewer than three queries, or a site that was not collected.
    """
    states = _states(activations, site)
    if len(states) < 3:
        raise InputError(f"a plane needs at least three queries, not {len(states)}")
    pca = PCA(n_components=2).fit(states)
    points = pca.transform(states)
    first, second = (float(share) for share in pca.explained_variance_ratio_)
    surfaces = activations.index["surface"].to_numpy(dtype=str)
    silhouette = {
        surface: float(silhouette_score(points[surfaces == surface], activations.harmful[surfaces == surface]))
        for surface in dict.fromkeys(surfaces)
    }
    return Plane(points, (first, second), silhouette)


def probe(fit: Activations, test: Activations, site: str, folds: int = 5, seed: int = 0) -> ProbeResult:
    """AUROC of a logistic probe fitted on `fit` and judged on `test`, always on other topics.

    The ordinary cross-validated probe is `probe(a, a, site)`; from text to audio it is `probe(text, audio, site)`.

    Raises:
        InputError: one class only, or fewer topics than folds.
    """
    scores = _held_out_scores(fit, test, site, fit.harmful, folds, seed)
    return _result(scores, test, seed)


def permutation_baseline(
    activations: Activations, site: str, repeats: int = 5, folds: int = 5, seed: int = 0
) -> ProbeResult:
    """The same probe on labels dealt anew among topics: what AUROC chance gives. low, high: the repeats' extremes."""
    rng = np.random.default_rng(seed)
    topics, member = np.unique(activations.topics, return_inverse=True)
    label_of_topic = np.array([activations.harmful[member == number].mean() > 0.5 for number in range(len(topics))])
    values = []
    for repeat in range(repeats):
        dealt = rng.permutation(label_of_topic)[member]
        scores = _held_out_scores(activations, activations, site, dealt, folds, seed + repeat)
        values.append(roc_auc_score(dealt, scores))
    return ProbeResult(float(np.mean(values)), float(min(values)), float(max(values)), len(member))


def fisher_ratio(states: np.ndarray, harmful: np.ndarray) -> float:
    """(mu_h - mu_b)^T (S_h + S_b)^-1 (mu_h - mu_b) with Ledoit-Wolf covariances, so that it is finite for d > n.

    Args:
        states: [query, d_model]. harmful: bool [query].

    Raises:
        InputError: fewer than two queries in a class.
    """
    if min(harmful.sum(), (~harmful).sum()) < 2:
        raise InputError("the Fisher ratio needs at least two queries of each class")
    one, other = states[harmful].astype(np.float64), states[~harmful].astype(np.float64)
    gap = one.mean(axis=0) - other.mean(axis=0)
    covariance = ledoit_wolf(one)[0] + ledoit_wolf(other)[0]
    return float(gap @ np.linalg.solve(covariance + 1e-12 * np.eye(len(gap)), gap))


def separability_table(activations: Activations, fit_surface: str = "text", seed: int = 0) -> pd.DataFrame:
    """For each site and surface: the surface's own probe, the probe of `fit_surface` carried over, the chance baseline.

    Returns:
        Columns `site, surface, measure, auroc, low, high, n`; measures `probe`, `transfer`, `permuted`.
    """
    surfaces = list(dict.fromkeys(activations.index["surface"]))
    parts = {surface: activations.where(surface=surface) for surface in surfaces}
    rows = []
    # Thousands of small fits: BLAS threads would only wait for each other, for minutes on a busy machine.
    with threadpool_limits(1):
        for site in activations.sites:
            for surface, part in parts.items():
                results = {"probe": probe(part, part, site, seed=seed)}
                if surface != fit_surface:
                    results["transfer"] = probe(parts[fit_surface], part, site, seed=seed)
                else:
                    results["permuted"] = permutation_baseline(part, site, seed=seed)
                where = {"site": site, "surface": surface}
                rows += [{**where, "measure": name, **vars(result)} for name, result in results.items()]
    return pd.DataFrame(rows)


def _held_out_scores(
    fit: Activations, test: Activations, site: str, labels: np.ndarray, folds: int, seed: int
) -> np.ndarray:
    """Probe scores [query of test], each from a probe that saw no query of its topic. `labels` are those of `fit`."""
    n_topics = min(len(np.unique(fit.topics[labels])), len(np.unique(fit.topics[~labels])))
    if n_topics < folds:
        raise InputError(f"a probe of {folds} folds needs {folds} topics of each class, not {n_topics}: add queries")
    source, target = _states(fit, site), _states(test, site)
    scores = np.full(len(target), np.nan)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for train, held_out in splitter.split(source, labels, fit.topics):
        inside = np.isin(test.topics, fit.topics[held_out])
        if inside.any():
            scored = _fit_probe(source[train], labels[train], fit.topics[train], seed)
            scores[inside] = scored(target[inside])
    unseen = np.isnan(scores)
    if unseen.any():  # topics that `fit` has not at all: any probe is fair to them
        scores[unseen] = _fit_probe(source, labels, fit.topics, seed)(target[unseen])
    return scores


def _fit_probe(states: np.ndarray, labels: np.ndarray, topics: np.ndarray, seed: int) -> Scorer:
    """Standardise and fit, with the penalty that does best on one inner split by topic; gives the scoring function.

    Classes are weighted alike: folds by topic are not quite balanced, and an intercept that follows the training folds'
    balance would push pooled scores the wrong way. Scores are in units of their spread on the training folds, so that
    folds with different penalties can be pooled.
    """
    inner = StratifiedGroupKFold(n_splits=3, shuffle=True, random_state=seed)
    train, held_out = next(inner.split(states, labels, topics))
    fair = 0 < labels[held_out].sum() < len(held_out) and 0 < labels[train].sum() < len(train)

    def build(penalty: float) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000, class_weight="balanced"))

    def quality(penalty: float) -> float:
        model = build(penalty).fit(states[train], labels[train])
        return float(roc_auc_score(labels[held_out], model.decision_function(states[held_out])))

    best = max(PENALTIES, key=quality) if fair else PENALTIES[0]
    model = build(best).fit(states, labels)
    spread = float(np.std(model.decision_function(states))) or 1.0
    return lambda new: model.decision_function(new) / spread


def _result(scores: np.ndarray, test: Activations, seed: int) -> ProbeResult:
    auroc, low, high = auroc_interval(list(scores), list(test.harmful), list(test.topics), seed, resamples=RESAMPLES)
    return ProbeResult(float(auroc), float(low), float(high), len(scores))


def _states(activations: Activations, site: str) -> np.ndarray:
    if site not in activations.states:
        raise InputError(f"no activations at site '{site}'; collected were {', '.join(activations.sites)}")
    return activations.states[site]
