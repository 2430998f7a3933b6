"""Probes with scikit-learn's interface, and the same probes for all sites, folds and resamples in one solve.

One at a time: `LogisticProbe`, `RidgeProbe`, `LdaProbe`, `DifferenceInMeans`, `MahalanobisProbe` are ordinary
scikit-learn classifiers of two classes, which go into its pipelines, searches and `CalibratedClassifierCV`.

All at once: `fit_batch` takes states [site, row, d_model] and a row of weights for each problem (a fold: 0 where a row
is held out; a resample: how often it was drawn) and gives models that score any states. Each estimator is `fit_batch`
with one site and one problem, so both forms are the same mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from casa_mech.errors import InputError, RunError
from casa_mech.files import writing
from probes.linear.gaussian import MahalanobisModels, fit_lda, fit_mahalanobis, fit_mean_difference
from probes.linear.solver import LinearModels, balanced, fit_models

ProbeKind = Literal["logistic", "ridge", "lda", "mean_difference", "mahalanobis"]
"""`logistic`: L2-penalised; `ridge`: least squares on ±1; `lda`: shared covariance with Ledoit-Wolf shrinkage;
`mean_difference`: along the line between the class means; `mahalanobis`: distance to the negative class minus distance
to the positive, each with its own shrunk covariance."""

PENALISED: tuple[ProbeKind, ...] = ("logistic", "ridge")
"""Kinds that take a penalty."""

Models = LinearModels | MahalanobisModels


def fit_batch(
    kind: ProbeKind,
    states: Tensor,
    labels: Tensor,
    weights: Tensor,
    penalty: Tensor | float = 1.0,
    class_weight: Literal["balanced"] | None = "balanced",
    tolerance: float = 1e-3,
) -> Models:
    """Models of one kind for every problem at every site, in one solve.

    Args:
        kind: which probe.
        states: [site, row, d_model], floating point, on the device that is to do the work.
        labels: bool [row], or [problem, row] where labels differ (permutations).
        weights: [problem, row], how often each row counts; 0 keeps it out.
        penalty: one, or [problem]; for `PENALISED` kinds (`1 / C` of scikit-learn's logistic, `alpha` of its ridge).
        class_weight: "balanced" lets both classes count alike, whatever their numbers.
        tolerance: how far the iterative kinds go (see `probes.linear.solver.fit_models`).

    Returns:
        Models whose `scores(states)` are [site, problem, row], positive for the positive class.

    Raises:
        InputError: a state that is not finite, or a problem with one class only.
    """
    labels = (labels > 0).expand(len(weights), -1)
    check_problems(states, labels, weights)
    weights = weights.to(states)
    if kind in PENALISED:
        strength = torch.as_tensor(penalty, dtype=states.dtype, device=states.device).expand(len(weights))
        factors = balanced(labels, weights) if class_weight else None
        loss: Literal["logistic", "squared"] = "logistic" if kind == "logistic" else "squared"
        return fit_models(states, labels, weights, strength, factors, loss=loss, tolerance=tolerance)
    if kind == "lda":
        return fit_lda(states, labels, weights, equal_priors=class_weight is not None)
    if kind == "mahalanobis":
        return fit_mahalanobis(states, labels, weights)
    return fit_mean_difference(states, labels, weights)


def check_problems(states: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Refuse problems that cannot be fitted.

    Raises:
        InputError: states that are not finite (the message names site and row), or a problem with one class only.
    """
    if not torch.isfinite(states).all():
        site, row, _ = (~torch.isfinite(states)).nonzero()[0].tolist()
        raise InputError(f"row {row} at site number {site} is not finite: collect it again in float32, or leave it out")
    drawn = weights > 0
    single = ~((drawn & labels).any(dim=1) & (drawn & ~labels).any(dim=1))
    if single.any():
        number = int(single.nonzero()[0, 0])
        raise InputError(f"problem {number} of {len(weights)} has one class only: give it harmful and benign rows")


class Probe(ClassifierMixin, BaseEstimator):
    """Base of all probes. A fitted one has `classes_`, and `coef_` [1, d_model] and `intercept_` [1] if linear."""

    _kind: ClassVar[ProbeKind]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _fit(self, X: Any, y: Any, sample_weight: Any = None) -> Models:
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, member = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            raise ValueError(
                f"Only binary classification is supported. The type of the target is multiclass with "
                f"{len(self.classes_)} classes."
            )
        if len(self.classes_) < 2:
            raise ValueError(f"Classifier can't train when only one class is present: {self.classes_[0]!r}")
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        factors = self._class_factors(y, member, weights)
        states, labels = torch.from_numpy(X).unsqueeze(0), torch.from_numpy(member == 1).unsqueeze(0)
        return self._solve(states, labels, torch.from_numpy(weights).unsqueeze(0), factors)

    def _class_factors(self, y: np.ndarray, member: np.ndarray, weights: np.ndarray) -> Tensor:
        class_weight = getattr(self, "class_weight", None)
        if class_weight == "balanced":
            share = np.bincount(member, weights=weights, minlength=2) / weights.sum()
            each = 0.5 / np.where(share > 0, share, 1)
        else:
            each = compute_class_weight(class_weight, classes=self.classes_, y=y)
        return torch.from_numpy(np.asarray(each, dtype=np.float64)[member]).unsqueeze(0)

    def _solve(self, states: Tensor, labels: Tensor, weights: Tensor, factors: Tensor) -> Models:
        raise NotImplementedError

    def _keep(self, models: Models) -> None:
        assert isinstance(models, LinearModels)
        self.coef_ = models.coef[0].numpy()
        self.intercept_ = models.intercept[0].numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores [row], positive for `classes_[1]`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return np.asarray(X @ self.coef_[0] + self.intercept_[0])

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]


class LogisticProbe(Probe):
    """Logistic regression on standardised features.

    Args:
        C: inverse strength of the L2 penalty, as in `sklearn.linear_model.LogisticRegression`.
        class_weight: "balanced", a dict of class to weight, or None.
        tol: largest gradient entry at the solution, relative to that at zero.
        max_iter: upper bound on iterations.
    """

    _kind = "logistic"

    def __init__(
        self, C: float = 0.1, class_weight: Any = "balanced", tol: float = 1e-10, max_iter: int = 1000
    ) -> None:
        self.C, self.class_weight, self.tol, self.max_iter = C, class_weight, tol, max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to states X [row, d_model] and labels y [row] of two classes; `sample_weight` [row] counts rows."""
        self._keep(self._fit(X, y, sample_weight))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [row, 2] of the classes, not calibrated (scikit-learn's `CalibratedClassifierCV` does)."""
        positive = 1 / (1 + np.exp(-np.clip(self.decision_function(X), -500, 500)))
        return np.stack([1 - positive, positive], axis=1)

    def _solve(self, states: Tensor, labels: Tensor, weights: Tensor, factors: Tensor) -> Models:
        models = fit_models(
            states, labels, weights, torch.tensor([1 / self.C], dtype=states.dtype), factors,
            tolerance=self.tol, max_iterations=self.max_iter,
        )  # fmt: skip
        self.n_iter_ = np.array([max(1, models.iterations)])
        return models


class RidgeProbe(Probe):
    """Least squares on ±1 with an L2 penalty, on standardised features.

    Args:
        alpha: strength of the penalty, as in `sklearn.linear_model.RidgeClassifier`.
        class_weight: "balanced", a dict of class to weight, or None.
    """

    _kind = "ridge"

    def __init__(self, alpha: float = 10.0, class_weight: Any = "balanced") -> None:
        self.alpha, self.class_weight = alpha, class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to states X [row, d_model] and labels y [row] of two classes; `sample_weight` [row] counts rows."""
        self._keep(self._fit(X, y, sample_weight))
        return self

    def _solve(self, states: Tensor, labels: Tensor, weights: Tensor, factors: Tensor) -> Models:
        strength = torch.tensor([self.alpha], dtype=states.dtype)
        return fit_models(
            states, labels, weights, strength, factors, loss="squared", tolerance=1e-9, max_iterations=1000
        )


class LdaProbe(Probe):
    """Linear discriminant with one covariance for both classes.

    Args:
        shrinkage: towards a multiple of the identity, 0 to 1, or "ledoit_wolf" to take it from the data.
        equal_priors: put the threshold as if both classes were equally frequent.
    """

    _kind = "lda"

    def __init__(self, shrinkage: float | str = "ledoit_wolf", equal_priors: bool = True) -> None:
        self.shrinkage, self.equal_priors = shrinkage, equal_priors

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to states X [row, d_model] and labels y [row] of two classes."""
        self._keep(self._fit(X, y))
        return self

    def _solve(self, states: Tensor, labels: Tensor, weights: Tensor, factors: Tensor) -> Models:
        return fit_lda(states, labels, weights, _shrinkage(self.shrinkage), self.equal_priors)


class DifferenceInMeans(Probe):
    """The line from the negative to the positive class's mean, with the threshold halfway; nothing to tune."""

    _kind = "mean_difference"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to states X [row, d_model] and labels y [row] of two classes; `sample_weight` [row] counts rows."""
        self._keep(self._fit(X, y, sample_weight))
        return self

    def _solve(self, states: Tensor, labels: Tensor, weights: Tensor, factors: Tensor) -> Models:
        return fit_mean_difference(states, labels, weights)


class MahalanobisProbe(Probe):
    """Squared Mahalanobis distance to the negative class minus that to the positive, each with its own covariance.

    A fitted one has `means_` [2, d_model] and `precisions_` [2, d_model, d_model] in place of `coef_`.

    Args:
        shrinkage: towards a multiple of the identity, 0 to 1, or "ledoit_wolf" to take it from the data.
    """

    _kind = "mahalanobis"

    def __init__(self, shrinkage: float | str = "ledoit_wolf") -> None:
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to states X [row, d_model] and labels y [row] of two classes."""
        models = self._fit(X, y)
        assert isinstance(models, MahalanobisModels)
        self.means_, self.precisions_ = models.means[0, 0].numpy(), models.precisions()[0, 0].numpy()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores [row], positive where `classes_[1]` is nearer."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        gaps = X[None] - self.means_[:, None]
        distances = np.einsum("cnd,cde,cne->cn", gaps, self.precisions_, gaps, optimize=True)
        return np.asarray(distances[0] - distances[1])

    def _solve(self, states: Tensor, labels: Tensor, weights: Tensor, factors: Tensor) -> Models:
        return fit_mahalanobis(states, labels, weights, _shrinkage(self.shrinkage))


PROBES: Mapping[str, type[Probe]] = {
    kind._kind: kind for kind in (LogisticProbe, RidgeProbe, LdaProbe, DifferenceInMeans, MahalanobisProbe)
}
"""The estimators by `ProbeKind`."""


def save_probe(probe: Any, path: Path | str, about: Mapping[str, Any] | None = None) -> None:
    """Write a fitted probe to `path`, a safetensors file with its fitted arrays; its header holds all else as JSON.

    Args:
        probe: a fitted probe, of one vector or of tokens.
        path: the file; written whole or not at all.
        about: stored beside it, as JSON values, such as the model's fingerprint, the site and the positions.
    """
    check_is_fitted(probe)
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(probe).items() if _is_numeric(value)}
    record = {
        "kind": probe._kind,
        "parameters": probe.get_params(),
        "classes": probe.classes_.tolist(),
        "n_features": int(probe.n_features_in_),
        "about": dict(about or {}),
    }
    with writing(path) as temporary:
        save_file(arrays, temporary, metadata={"probe": json.dumps(record)})


def load_probe(
    path: Path | str, fingerprint: str = "", kinds: Mapping[str, type[Any]] = PROBES
) -> tuple[Any, dict[str, Any]]:
    """A probe that `save_probe` wrote, and the record `about` that was stored beside it.

    Args:
        path: the file.
        kinds: the classes that it may be of, by their kind.
        fingerprint: if given, the probe must have been saved with `about["fingerprint"]` equal to it.

    Raises:
        RunError: missing, cut short, no probe, or another model's.
    """
    try:
        with safe_open(path, framework="numpy") as stored:
            record = json.loads((stored.metadata() or {})["probe"])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a dict)
        probe = kinds[record["kind"]](**record["parameters"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(
            f"{path} is not a readable probe ({type(error).__name__}: {error}); fit and save it again"
        ) from None
    saved = record["about"].get("fingerprint", "")
    if fingerprint and saved != fingerprint:
        raise RunError(f"{path} was fitted on another model ({saved[:8] or 'not said'}), not on {fingerprint[:8]}")
    for name, value in arrays.items():
        setattr(probe, name, value)
    probe.classes_, probe.n_features_in_ = np.array(record["classes"]), record["n_features"]
    return probe, record["about"]


def _is_numeric(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fi" and value.ndim > 0


def _shrinkage(value: float | str) -> float | None:
    if value == "ledoit_wolf":
        return None
    if isinstance(value, str) or not 0 <= value <= 1:
        raise ValueError(f"shrinkage must be between 0 and 1 or 'ledoit_wolf', not {value!r}")
    return float(value)
