"""Separability of harmful and benign requests in hidden states, at each layer, on each surface and across surfaces.

The measures of the method specification's section 6, for all sites at once: five-fold logistic probes with nested
choice of the penalty, the matrix of transfers from one surface to another, difference-in-means probes, a shrinkage
Fisher ratio, PCA with explained variance and silhouette, and the controls: permuted labels and prompt length. Folds
keep a topic together, so a probe is always judged on topics that it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from casa_mech.errors import InputError
from casa_mech.judging.hypothesis import PERMUTATIONS
from casa_mech.judging.stats import auroc_interval
from probes.activations.memory import Activations
from probes.linear.estimators import ProbeKind
from probes.linear.gaussian import fisher_ratios
from probes.linear.validation import PENALTIES, CrossValidated, Rows, chance_of, cross_validate, probe_controls


@dataclass(frozen=True)
class Plane:
    """A two-dimensional view of hidden states."""

    points: np.ndarray
    """[query, 2]."""
    explained: tuple[float, float]
    """The two components' shares of the variance."""
    silhouette: dict[str, float]
    """For each surface the silhouette of the two classes in the plane, from -1 to 1."""


def pca_plane(activations: Activations, site: str) -> Plane:
    """PCA of all queries at `site`, so that the surfaces share one plane.

    Raises:
        InputError: fewer than three queries, or a site that was not collected.
    """
    states = activations.at(site)
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


def fisher_ratio(states: np.ndarray, harmful: np.ndarray) -> float:
    """(mu_h - mu_b)^T (S_h + S_b)^-1 (mu_h - mu_b) with Ledoit-Wolf covariances, which keep it finite for d > n.

    Args:
        states: [query, d_model].
        harmful: bool [query].

    Raises:
        InputError: fewer than two queries in a class.
    """
    if min(harmful.sum(), (~harmful).sum()) < 2:
        raise InputError("the Fisher ratio needs at least two queries of each class")
    tensor = torch.tensor(states, dtype=torch.float64).unsqueeze(0)
    ones = torch.ones(1, len(harmful), dtype=torch.float64)
    return float(fisher_ratios(tensor, torch.tensor(harmful).unsqueeze(0), ones)[0, 0])


def transfer_matrix(
    activations: Activations,
    kind: ProbeKind = "logistic",
    folds: int = 5,
    seed: int = 0,
    sites: Sequence[str] = (),
    deals: int = PERMUTATIONS,
) -> pd.DataFrame:
    """AUROC of probes fitted on each surface and judged on each, at every site, on unseen topics.

    Args:
        activations: several surfaces; index column `surface`.
        kind: which probe.
        folds: of the cross-validation.
        seed: of the folds, the intervals and the permutations.
        sites: which; all when not given.
        deals: of the labels, behind `p`; 0 for no test.

    Returns:
        Columns `site, fit, surface, auroc, low, high, n, p`; the diagonal is the ordinary cross-validated probe. `p` is
        that of an AUROC as high, by probes fitted and judged on labels dealt anew (`chance_of`; NaN without deals).

    Raises:
        InputError: one class only, fewer topics of a class than folds, or states that are not finite.
    """
    names = list(sites or activations.sites)
    by_surface = _by_surface(activations)
    rows = []
    # Many small solves: BLAS threads would only wait for each other, for minutes on a busy machine.
    with threadpool_limits(1):
        for fit, fitted in by_surface.items():
            others = {surface: other for surface, other in by_surface.items() if surface != fit}
            own, *carried = _cross_validate(fitted, names, kind, folds, seed, list(others.values()))
            p_values = np.full((1 + len(others), len(names)), np.nan)
            if deals:
                carried_rows = [_rows(other, names) for other in others.values()]
                chances = chance_of(_rows(fitted, names), carried_rows, deals, kind=kind, folds=folds, seed=seed)
                p_values = np.stack([chance.p_value for chance in chances])
            for surface, result, of_sites in zip([fit, *others], [own, *carried], p_values, strict=True):
                test = by_surface[surface]
                for site, scores, p in zip(names, result.scores, of_sites, strict=True):
                    interval = _interval(scores, test, seed)
                    rows.append({"site": site, "fit": fit, "surface": surface, **interval, "p": float(p)})
    table = pd.DataFrame(rows)
    order = {site: place for place, site in enumerate(names)}
    return table.sort_values("site", key=lambda column: column.map(order), kind="stable").reset_index(drop=True)


def controls(activations: Activations, folds: int = 5, seed: int = 0, deals: int = PERMUTATIONS) -> pd.DataFrame:
    """The measures that a probe's AUROC has to be compared with, at every site and surface.

    Args:
        activations: one or several surfaces; index column `surface`.
        folds: of the cross-validation.
        seed: of the folds, the intervals and the permutations.
        deals: how often labels are dealt anew.

    Returns:
        Columns `site, surface`, those of `ProbeControls` (the probe, permuted labels, prompt length,
        the probe among prompts of equal length), `permuted_low, permuted_high` (the middle 95 % of the deals),
        `mean_difference` (that probe's AUROC), `fisher` (shrinkage Fisher ratio), `explained` (the first two
        components' share of the variance) and `silhouette` (of the classes in their plane).

    Raises:
        InputError: one class only, fewer topics of a class than folds, or states that are not finite.
    """
    planes = {site: pca_plane(activations, site) for site in activations.sites}
    rows = []
    with threadpool_limits(1):
        for surface, subset in _by_surface(activations).items():
            states, harmful, topics, lengths = subset.stacked(), subset.harmful, subset.topics, _lengths(subset)
            (logistic,) = _cross_validate(subset, subset.sites, "logistic", folds, seed, [])
            (means,) = _cross_validate(subset, subset.sites, "mean_difference", folds, seed, [])
            (chance,) = chance_of(_rows(subset, subset.sites), deals=deals, folds=folds, seed=seed)
            for place, site in enumerate(subset.sites):
                against = probe_controls(
                    logistic.scores[place], chance.aurocs[place], float(chance.p_value[place]), harmful, lengths,
                    topics, seed,
                )  # fmt: skip
                rows.append(
                    {
                        "site": site,
                        "surface": surface,
                        **asdict(against),
                        "permuted_low": float(chance.band[0, place]),
                        "permuted_high": float(chance.band[1, place]),
                        "mean_difference": _interval(means.scores[place], subset, seed)["auroc"],
                        "fisher": fisher_ratio(states[place], harmful),
                        "explained": sum(planes[site].explained),
                        "silhouette": planes[site].silhouette[surface],
                    }
                )
    return pd.DataFrame(rows)


def separability_table(
    matrix: pd.DataFrame, against: pd.DataFrame | None = None, fit_surface: str = "text", positions: str = ""
) -> pd.DataFrame:
    """AUROC by layer of each surface's own probe, of the one fitted on `fit_surface`, and of permuted labels.

    Args:
        matrix: of `transfer_matrix`.
        against: of `controls`; None: nothing on permuted labels.
        fit_surface: on which the transferred probe was fitted.
        positions: written into that column.

    Returns:
        Columns `site, surface, measure, auroc, low, high, n, positions`; measures `probe`, `transfer`, `permuted`.
    """
    own = matrix[matrix["fit"] == matrix["surface"]].assign(measure="probe")
    carried = matrix[(matrix["fit"] == fit_surface) & (matrix["surface"] != fit_surface)].assign(measure="transfer")
    parts = [own, carried]
    if against is not None:
        chance = against[against["surface"] == fit_surface].assign(measure="permuted")
        parts += [chance.assign(auroc=chance["permuted"], low=chance["permuted_low"], high=chance["permuted_high"])]
    columns = ["site", "surface", "measure", "auroc", "low", "high", "n"]
    table = pd.concat([rows[columns] for rows in parts], ignore_index=True)
    order = {site: place for place, site in enumerate(dict.fromkeys(matrix["site"]))}
    table = table.sort_values("site", key=lambda column: column.map(order), kind="stable")
    return table.assign(positions=positions).reset_index(drop=True)


def _cross_validate(
    fit: Activations, sites: Sequence[str], kind: ProbeKind, folds: int, seed: int, tests: Sequence[Activations]
) -> list[CrossValidated]:
    others = [(test.stacked(sites), test.topics) for test in tests]
    return cross_validate(fit.stacked(sites), fit.harmful, fit.topics, kind, PENALTIES, folds, seed, others)


def _rows(activations: Activations, sites: Sequence[str]) -> Rows:
    units = activations.index["label"] + " " + activations.index["query_id"]
    return Rows(activations.stacked(sites), activations.harmful, activations.topics, units.to_numpy(dtype=str))


def _by_surface(activations: Activations) -> dict[str, Activations]:
    surfaces = list(dict.fromkeys(activations.index["surface"]))
    return {surface: activations.where(surface=surface) for surface in surfaces}


def _lengths(activations: Activations) -> np.ndarray:
    index = activations.index
    return index["length"].to_numpy(dtype=float) if "length" in index else np.full(len(index), np.nan)


def _interval(scores: np.ndarray, test: Activations, seed: int) -> dict[str, float]:
    """`auroc, low, high` (bootstrap over topics) and `n` of held-out `scores` [query]."""
    auroc, low, high = auroc_interval(list(scores), list(test.harmful), list(test.topics), seed)
    return {"auroc": float(auroc), "low": float(low), "high": float(high), "n": len(scores)}
