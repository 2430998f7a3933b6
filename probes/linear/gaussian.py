"""Probes from means and shrunk covariances, for many sites and problems: LDA, Mahalanobis, difference in means.

Covariances are shrunk towards a multiple of the identity by Ledoit and Wolf's formula (as
`sklearn.covariance.ledoit_wolf`, here with row weights), so they can be inverted when d_model exceeds the rows. All
solves are in the smaller of the two dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probes.linear.solver import LinearModels


@dataclass(frozen=True)
class ShrunkCovariance:
    """`(1 - shrinkage) R'R + ridge I` of residuals R, stored as a factor, so that either dimension can be inverted."""

    factor: Tensor
    """[row, d_model]: R times the root of `1 - shrinkage`."""
    ridge: Tensor
    """[], above 0."""

    @classmethod
    def of(cls, residuals: Tensor, weights: Tensor, shrinkage: float | None = None) -> ShrunkCovariance:
        """The covariance of `residuals` [row, d_model], which have mean zero and count `weights` [row] times.

        `shrinkage` from 0 to 1; None: Ledoit and Wolf's.
        """
        total, width = weights.sum(), residuals.shape[1]
        rooted = residuals * (weights / total).sqrt().unsqueeze(1)
        mean = rooted.square().sum() / width
        share = _ledoit_wolf(residuals, rooted, weights, mean) if shrinkage is None else mean.new_tensor(shrinkage)
        tiny = torch.finfo(residuals.dtype).eps * (mean + torch.finfo(residuals.dtype).tiny ** 0.5)
        return cls(rooted * (1 - share).sqrt(), share * mean + tiny)

    def solve(self, right: Tensor) -> Tensor:
        """The inverse times each row of `right` [row, d_model]."""
        rows, width = self.factor.shape
        if width <= rows:
            whole = self.factor.T @ self.factor
            whole.diagonal().add_(self.ridge)
            return torch.cholesky_solve(right.T, torch.linalg.cholesky(whole)).T
        inner = self.factor @ self.factor.T
        inner.diagonal().add_(self.ridge)
        across = torch.cholesky_solve(self.factor @ right.T, torch.linalg.cholesky(inner))
        return (right - across.T @ self.factor) / self.ridge


@dataclass(frozen=True)
class MahalanobisModels:
    """A Gaussian for each class, at every site and for every problem."""

    means: Tensor
    """[site, problem, class, d_model]."""
    covariances: tuple[tuple[tuple[ShrunkCovariance, ShrunkCovariance], ...], ...]
    """For each site and problem those of the negative and the positive class."""

    def scores(self, states: Tensor) -> Tensor:
        """Squared distance to the negative class minus that to the positive, [site, problem, row]."""
        scores = [
            [self._score(states[site].to(self.means), site, problem) for problem in range(self.means.shape[1])]
            for site in range(len(self.means))
        ]
        return torch.stack([torch.stack(by_problem) for by_problem in scores])

    def precisions(self) -> Tensor:
        """Inverse covariances [site, problem, class, d_model, d_model]."""
        eye = torch.eye(self.means.shape[-1], dtype=self.means.dtype, device=self.means.device)
        return torch.stack(
            [torch.stack([torch.stack([one.solve(eye) for one in pair]) for pair in row]) for row in self.covariances]
        )

    def _score(self, states: Tensor, site: int, problem: int) -> Tensor:
        distances = []
        for mean, covariance in zip(self.means[site, problem], self.covariances[site][problem], strict=True):
            gap = states - mean
            distances.append((gap * covariance.solve(gap)).sum(dim=1))
        return distances[0] - distances[1]


def class_means(states: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted means [site, problem, class, d_model] of the negative and the positive class.

    Args:
        states: [site, row, d_model].
        labels: bool [problem, row].
        weights: [problem, row], how often a row counts (0: held out).
    """
    by_class = [weights * ~labels, weights * labels]
    return torch.stack([(counts / counts.sum(dim=1, keepdim=True)) @ states for counts in by_class], dim=2)


def fit_mean_difference(states: Tensor, labels: Tensor, weights: Tensor) -> LinearModels:
    """Models along the difference of the class means, threshold halfway. Shapes as in `class_means`."""
    means = class_means(states, labels, weights)
    coef = means[:, :, 1] - means[:, :, 0]
    return LinearModels(coef, -(coef * means.mean(dim=2)).sum(dim=-1))


def fit_lda(
    states: Tensor, labels: Tensor, weights: Tensor, shrinkage: float | None = None, equal_priors: bool = True
) -> LinearModels:
    """Fisher's direction with one shrunk covariance of both classes. Shapes as in `class_means`."""
    means = class_means(states, labels, weights)
    coef = torch.empty_like(means[:, :, 0])
    for site, problem in _pairs(means):
        rows = weights[problem] > 0
        residuals = states[site, rows] - means[site, problem][labels[problem, rows].long()]
        covariance = ShrunkCovariance.of(residuals, weights[problem, rows], shrinkage)
        gap = means[site, problem, 1] - means[site, problem, 0]
        coef[site, problem] = covariance.solve(gap.unsqueeze(0))[0]
    intercept = -(coef * means.mean(dim=2)).sum(dim=-1)
    if not equal_priors:
        intercept = intercept + torch.log((weights * labels).sum(dim=1) / (weights * ~labels).sum(dim=1))
    return LinearModels(coef, intercept)


def fit_mahalanobis(
    states: Tensor, labels: Tensor, weights: Tensor, shrinkage: float | None = None
) -> MahalanobisModels:
    """A mean and a shrunk covariance for each class. Shapes as in `class_means`."""
    means = class_means(states, labels, weights)
    covariances = tuple(
        tuple(
            _class_covariances(states[site], labels[problem], weights[problem], means[site, problem], shrinkage)
            for problem in range(means.shape[1])
        )
        for site in range(len(means))
    )
    return MahalanobisModels(means, covariances)


def fisher_ratios(states: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`(m1 - m0)' (S1 + S0)^-1 (m1 - m0)` with Ledoit-Wolf covariances, [site, problem]. Shapes as in `class_means`."""
    means = class_means(states, labels, weights)
    ratio = torch.empty_like(means[:, :, 0, 0])
    for site, problem in _pairs(means):
        negative, positive = _class_covariances(
            states[site], labels[problem], weights[problem], means[site, problem], None
        )
        both = ShrunkCovariance(torch.cat([negative.factor, positive.factor]), negative.ridge + positive.ridge)
        gap = (means[site, problem, 1] - means[site, problem, 0]).unsqueeze(0)
        ratio[site, problem] = (gap * both.solve(gap)).sum()
    return ratio


def _class_covariances(
    states: Tensor, labels: Tensor, weights: Tensor, means: Tensor, shrinkage: float | None
) -> tuple[ShrunkCovariance, ShrunkCovariance]:
    """Those of the negative and the positive class at one site: states [row, d_model], means [class, d_model]."""
    negative, positive = (
        ShrunkCovariance.of(states[rows] - mean, weights[rows], shrinkage)
        for rows, mean in zip(((weights > 0) & ~labels, (weights > 0) & labels), means, strict=True)
    )
    return negative, positive


def _ledoit_wolf(residuals: Tensor, rooted: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """The share of the identity, from 0 to 1; `mean` is the mean variance of a feature."""
    total, width = weights.sum(), residuals.shape[1]
    gram = rooted @ rooted.T if len(rooted) < width else rooted.T @ rooted
    squared = gram.square().sum()
    fourth = (weights * residuals.square().sum(dim=1).square()).sum() / total
    noise = (fourth - squared) / (width * total)
    distance = squared / width - mean.square()
    if distance <= 0:
        return torch.ones_like(mean)
    return torch.minimum(noise, distance).clamp(min=0) / distance


def _pairs(means: Tensor) -> list[tuple[int, int]]:
    return [(site, problem) for site in range(len(means)) for problem in range(means.shape[1])]
