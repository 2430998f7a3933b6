"""Many penalised linear models in one solve: all sites, folds, penalties and bootstrap resamples at once.

A problem is a column: which rows count and how much, which labels, which penalty. All problems of a site share its
states, so one iteration for all of them is two matrix products, where a loop over scikit-learn's estimators would be
thousands of small solves. Standardising differs from problem to problem (each by its own training rows), and need not
touch the states: dividing a feature by its spread is the same as penalising its coefficient by the spread's square, and
the intercept takes the means.

The solver is preconditioned nonlinear conjugate gradients (Polak-Ribière) with an exact line search. The
preconditioner is the Hessian with all rows' curvature set to its mean, which one eigendecomposition a site serves for
every problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["logistic", "squared"]

_REFRESHED = (0, 2, 5, 11, 23, 47)
"""Iterations at which the preconditioner takes the curvature anew, and the directions start afresh."""


@dataclass(frozen=True)
class LinearModels:
    """Fitted linear models, one for every site and problem."""

    coef: Tensor
    """[site, problem, d_model], on the states as they are, not standardised."""
    intercept: Tensor
    """[site, problem]."""
    iterations: int = 0
    """Number that the solver took; 0 where there was nothing to iterate."""

    def scores(self, states: Tensor) -> Tensor:
        """Decision values [site, problem, row] of `states` [site, row, d_model]; above 0: the positive class."""
        return torch.baddbmm(self.intercept.unsqueeze(-1), self.coef, states.to(self.coef.dtype).transpose(1, 2))


def fit_models(
    states: Tensor,
    labels: Tensor,
    weights: Tensor,
    penalty: Tensor,
    class_weights: Tensor | None = None,
    *,
    loss: Loss = "logistic",
    standardise: bool = True,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
) -> LinearModels:
    """Models that minimise `sum_i c_i l(y_i, x_i w + t) + penalty / 2 |w|^2`, one for every site and problem.

    `l` is log(1 + exp(-y z)) for y = ±1, or (y - z)^2 / 2; x is standardised by the problem's own rows.

    Args:
        states: [site, row, d_model], floating point; the solve runs on its device and in its dtype.
        labels: bool or ±1 [problem, row].
        weights: [problem, row], how often a row counts (0: held out).
        penalty: [problem], above 0; scikit-learn's `1 / C`, or ridge's `alpha`.
        class_weights: [problem, row], factors on the loss alone (not on means and spreads); default none.
        loss: logistic or squared.
        standardise: divide each feature by its spread over the problem's rows (weights count).
        tolerance: largest gradient entry at which a problem is solved, in units of the gradient's at zero.
        max_iterations: upper bound.
    """
    states, centre, spread = _centred(states)
    rows, signs = weights.to(states), torch.where(labels > 0, 1, -1).to(states)
    cost = rows if class_weights is None else rows * class_weights.to(states)
    if standardise:
        ridge = _variance(states, rows) * penalty.to(states).unsqueeze(-1)
    else:
        ridge = penalty.to(states).unsqueeze(-1) / spread.square().unsqueeze(1)
    problem = _Problem(states, signs, cost, ridge, loss == "logistic")
    coef, shift, iterations = _descend(problem, _Eigen.of(states), penalty.to(states), tolerance, max_iterations)
    coef = coef / spread.unsqueeze(1)
    return LinearModels(coef, shift - torch.bmm(coef, centre.unsqueeze(-1)).squeeze(-1), iterations)


def balanced(labels: Tensor, weights: Tensor) -> Tensor:
    """Class weights [problem, row] that make both classes count alike, as scikit-learn's `class_weight="balanced"`.

    Args:
        labels: bool [problem, row]; each problem must have both classes.
        weights: [problem, row].
    """
    positive = labels > 0
    share = (weights * positive).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
    return torch.where(positive, 0.5 / share, 0.5 / (1 - share))


@dataclass(frozen=True)
class _Problem:
    """The function that is minimised, for all sites and problems, and its derivatives."""

    states: Tensor
    """[site, row, d_model], centred and scaled."""
    signs: Tensor
    """±1 [problem, row]."""
    cost: Tensor
    """[problem, row]: how much each row's loss counts."""
    ridge: Tensor
    """[site, problem, d_model]: the penalty on each squared coefficient."""
    logistic: bool
    """Else the squared loss."""

    def gradient(self, coef: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient by the coefficients [site, problem, d_model] and by the intercepts [site, problem, 1]."""
        slope, _ = self.slopes(scores)
        return torch.baddbmm(self.ridge * coef, slope, self.states), slope.sum(dim=-1, keepdim=True)

    def slopes(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of the weighted loss by the scores, [site, problem, row]."""
        if not self.logistic:
            return self.cost * (scores - self.signs), self.cost.expand_as(scores)
        wrong = torch.sigmoid(-self.signs * scores)
        return -self.cost * self.signs * wrong, self.cost * wrong * (1 - wrong)

    def step(self, coef: Tensor, scores: Tensor, direction: Tensor, change: Tensor) -> Tensor:
        """Step length [site, problem, 1]: Newton's method along `direction`, which changes the scores by `change`."""
        ridged = self.ridge * direction
        first, second = (ridged * coef).sum(-1, keepdim=True), (ridged * direction).sum(-1, keepdim=True)
        length = torch.zeros_like(first)
        for _ in range(3 if self.logistic else 1):
            slope, bend = self.slopes(scores + length * change)
            slope_along = (slope * change).sum(-1, keepdim=True) + first + length * second
            bend_along = (bend * change * change).sum(-1, keepdim=True) + second
            length = length - slope_along / bend_along.clamp(min=torch.finfo(length.dtype).tiny)
        return length


@dataclass(frozen=True)
class _Eigen:
    """The eigendecomposition of each site's X'X; r is the smaller of row and d_model."""

    values: Tensor
    """[site, r]."""
    vectors: Tensor
    """[site, d_model, r]."""

    @classmethod
    def of(cls, states: Tensor) -> _Eigen:
        """The decomposition for `states` [site, row, d_model]."""
        turned = states.transpose(1, 2)
        if states.shape[2] <= states.shape[1]:
            values, vectors = torch.linalg.eigh(turned @ states)
        else:
            values, vectors = torch.linalg.eigh(states @ turned)
            least = 1e-6 * values.amax(dim=1, keepdim=True)
            vectors = turned @ (vectors / values.clamp(min=least).sqrt().unsqueeze(1))
        return cls(values.clamp(min=0), vectors)


class _Preconditioner:
    """The inverse of `curvature X'X + penalty`, and of the intercept's curvature."""

    def __init__(self, eigen: _Eigen, bend: Tensor, penalty: Tensor) -> None:
        """`bend` [site, problem, row]: the loss's second derivatives, of which the mean stands for all."""
        self._eigen = eigen
        mean = bend.mean(dim=-1, keepdim=True)
        self._rest = (1 / penalty).unsqueeze(-1)
        self._factors = 1 / (mean * eigen.values.unsqueeze(1) + penalty.unsqueeze(-1))
        if eigen.vectors.shape[1] > eigen.vectors.shape[2]:
            self._factors -= self._rest
        self._shift = 1 / bend.sum(dim=-1, keepdim=True)

    def __call__(self, gradient: Tensor, by_shift: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self._eigen.vectors
        conditioned = (self._factors * (gradient @ vectors)) @ vectors.transpose(1, 2)
        if vectors.shape[1] > vectors.shape[2]:
            conditioned = conditioned + self._rest * gradient
        return conditioned, self._shift * by_shift


def _descend(
    problem: _Problem, eigen: _Eigen, penalty: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Coefficients [site, problem, d_model], intercepts [site, problem], and the iterations that it took."""
    states = problem.states
    turned, tiny = states.transpose(1, 2), torch.finfo(states.dtype).tiny
    coef = states.new_zeros(len(states), len(problem.cost), states.shape[2])
    shift = states.new_zeros(*coef.shape[:2], 1)
    scores = states.new_zeros(*coef.shape[:2], states.shape[1])
    gradient, by_shift = problem.gradient(coef, scores)
    first = gradient.abs().amax(dim=-1, keepdim=True).clamp(min=tiny)
    direction, along, size = torch.zeros_like(coef), torch.zeros_like(shift), torch.ones_like(shift)
    old, old_shift = gradient, by_shift
    iteration = 0
    for iteration in range(max_iterations):
        if (torch.maximum(gradient.abs().amax(-1, keepdim=True), by_shift.abs()) <= tolerance * first).all():
            break
        fresh = iteration in _REFRESHED if problem.logistic else iteration == 0
        if fresh:
            condition = _Preconditioner(eigen, problem.slopes(scores)[1], penalty)
        better, better_shift = condition(gradient, by_shift)
        grown = ((gradient - old) * better).sum(-1, keepdim=True) + (by_shift - old_shift) * better_shift
        keep = torch.zeros_like(size) if fresh else (grown / size.clamp(min=tiny)).clamp(min=0)
        size = (gradient * better).sum(-1, keepdim=True) + by_shift * better_shift
        direction, along = keep * direction - better, keep * along - better_shift
        change = torch.baddbmm(along, direction, turned)
        length = problem.step(coef, scores, direction, change)
        coef, shift, scores = coef + length * direction, shift + length * along, scores + length * change
        old, old_shift = gradient, by_shift
        gradient, by_shift = problem.gradient(coef, scores)
    return coef, shift.squeeze(-1), iteration


def _centred(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States whose features have mean 0 and spread 1 over all rows, for the arithmetic's sake; means; spreads."""
    centre = states.mean(dim=1)
    spread = states.std(dim=1, correction=0)
    spread = torch.where(spread > 1e-7 * (1 + centre.abs()), spread, 1)
    return (states - centre.unsqueeze(1)) / spread.unsqueeze(1), centre, spread


def _variance(states: Tensor, rows: Tensor) -> Tensor:
    """Variance of each feature over each problem's rows [site, problem, d_model]; 1 where it is 0, as scikit-learn."""
    share = rows / rows.sum(dim=1, keepdim=True)
    mean = share @ states
    variance = share @ (states * states) - mean * mean
    return torch.where(variance > 1e-8, variance, 1)
