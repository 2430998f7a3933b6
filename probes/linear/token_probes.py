"""Probes that read a prompt's tokens, not one vector: attention-pooled, and the most harmful token.

A mean over a long prompt drowns a short harmful passage. Both probes score each token by a linear function and pool the
scores: by a softmax with a query of its own (`attention`), or by the maximum (`max`), as probes of long prompts do
(Kramár et al., arXiv 2601.11516). They start from the logistic probe of the mean states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import softplus

from casa_mech.errors import InputError
from probes.linear.estimators import LogisticProbe

TokenProbeKind = Literal["attention", "max"]
"""`attention`: scores pooled by a softmax; `max`: the highest score."""


class TokenProbe(ClassifierMixin, BaseEstimator):
    """Base of the probes of tokens. A fitted one has `coef_`, `query_` [1, d_model] and `intercept_` [1].

    X is a sequence of states [token, d_model], one for each prompt, of any lengths.

    Args:
        C: inverse strength of the L2 penalty on `coef_` and `query_` in standardised units.
        max_iter: upper bound on iterations of L-BFGS.
    """

    _kind: ClassVar[TokenProbeKind]

    def __init__(self, C: float = 0.1, max_iter: int = 100) -> None:
        self.C, self.max_iter = C, max_iter

    def fit(self, X: Sequence[np.ndarray], y: Any) -> Self:
        """Fit to the tokens X of each prompt and labels y [prompt] of two classes, which count alike.

        Raises:
            InputError: a prompt without tokens or with states that are not finite, or one class only.
        """
        self.classes_, member = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise InputError(f"a probe needs two classes, not {len(self.classes_)}")
        for number, tokens in enumerate(X):
            if not len(tokens) or not np.isfinite(tokens).all():
                raise InputError(f"prompt number {number} has no tokens, or states that are not finite")
        every = np.concatenate(X)
        self.n_features_in_ = every.shape[1]
        mean, spread = every.mean(axis=0), every.std(axis=0)
        spread[spread == 0] = 1
        scaled = [(tokens - mean) / spread for tokens in X]
        start = LogisticProbe(C=self.C).fit(np.stack([tokens.mean(axis=0) for tokens in scaled]), member)
        padded, real = _padded(scaled)
        value, query, shift = self._descend(padded, real, member, start)
        self.coef_, self.query_ = (value / spread)[None], (query / spread)[None]
        self.intercept_ = np.array([shift - (value / spread) @ mean])
        return self

    def _descend(
        self, states: Tensor, real: Tensor, member: np.ndarray, start: LogisticProbe
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Values [d_model], query [d_model] and intercept at the least penalised loss, from the mean's probe."""
        value = torch.tensor(start.coef_[0], dtype=torch.float64, requires_grad=True)
        shift = torch.tensor(start.intercept_, dtype=torch.float64, requires_grad=True)
        query = torch.zeros_like(value, requires_grad=True)
        positive = torch.from_numpy(member == 1)
        signs = torch.where(positive, 1.0, -1.0).double()
        share = positive.double().mean()
        weights = torch.where(positive, 0.5 / share, 0.5 / (1 - share))
        solver = torch.optim.LBFGS([value, query, shift], max_iter=self.max_iter, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            scores = self._pool(states @ value + shift, states @ query, real)
            total = (weights * softplus(-signs * scores)).sum() + (value @ value + query @ query) / (2 * self.C)
            total.backward()
            return total

        with torch.enable_grad():
            solver.step(loss)
        return value.detach().numpy(), query.detach().numpy(), float(shift.detach())

    def decision_function(self, X: Sequence[np.ndarray]) -> np.ndarray:
        """Scores [prompt], positive for `classes_[1]`."""
        check_is_fitted(self)
        states, real = _padded(X)
        scores = states @ torch.from_numpy(self.coef_[0]) + float(self.intercept_[0])
        return self._pool(scores, states @ torch.from_numpy(self.query_[0]), real).numpy()

    def predict(self, X: Sequence[np.ndarray]) -> np.ndarray:
        """The class of each prompt."""
        return self.classes_[(self.decision_function(X) > 0).astype(int)]

    @staticmethod
    def _pool(scores: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """[prompt] of tokens' scores and keys [prompt, token]; `real` is False at padding."""
        raise NotImplementedError


class AttentionProbe(TokenProbe):
    """Tokens' scores, averaged with the softmax of their product with a query."""

    _kind = "attention"

    @staticmethod
    def _pool(scores: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        return (keys.masked_fill(~real, -torch.inf).softmax(dim=1) * scores).sum(dim=1)


class MaxProbe(TokenProbe):
    """The highest of the tokens' scores."""

    _kind = "max"

    @staticmethod
    def _pool(scores: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        return scores.masked_fill(~real, -torch.inf).amax(dim=1)


TOKEN_PROBES: Mapping[str, type[TokenProbe]] = {kind._kind: kind for kind in (AttentionProbe, MaxProbe)}
"""The probes of tokens by `TokenProbeKind`."""


def _padded(tokens: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """float64 [prompt, token, d_model], zeros at padding, and bool [prompt, token]: where it is none."""
    rows = [torch.from_numpy(np.array(row, dtype=np.float64)) for row in tokens]
    real = torch.arange(max(len(row) for row in rows)) < torch.tensor([len(row) for row in rows])[:, None]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), real
