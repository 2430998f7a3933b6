"""Safety attention: one cross-attention from a class query to the prompt's hidden states, giving v_s in [0, 1].

The forms are those of docs/method.md §1.2 (conflict B). None of them is an average of softmax weights alone: those sum
to 1 over the prompt, so their mean is 1/T whatever the prompt says.
"""

from __future__ import annotations

import math

import torch
from torch import BoolTensor, Tensor, nn
from torch.nn import functional

from casa_mech.casa.config import CasaConfig
from casa_mech.errors import InputError

SAFE, UNSAFE = 0, 1
"""Index of each class in class embeddings, logit pairs and token ids."""


class SafetyAttention(nn.Module):
    """Queries from two class embeddings, keys and values from detached prompt states (docs/method.md §1.2).

    Parameters stay in float32 whatever the model's dtype is.

    Args:
        config: form, width, top-k, query source and layer are read from it.
        embeddings: class embeddings [2, d_model] (safe, unsafe); a buffer, or the start of a parameter for
            `learned_free`.
    """

    def __init__(self, config: CasaConfig, embeddings: Tensor) -> None:
        super().__init__()
        self.form, self.top_k = config.form, config.top_k
        d_model = embeddings.shape[1]
        self.width = min(config.width, d_model)
        # The sources differ in scale by orders of magnitude; unit RMS lets all of them start alike.
        embeddings = functional.rms_norm(embeddings.detach().to(torch.float32), (d_model,))
        if config.query_source == "learned_free":
            self.class_embeddings = nn.Parameter(embeddings)
        else:
            self.register_buffer("class_embeddings", embeddings)
        # Blocks hand over a residual stream that no norm has touched, with huge outlier dimensions.
        self.normalise = config.layer != "norm"
        self.w_q = nn.Linear(d_model, self.width, bias=False)
        self.w_k = nn.Linear(d_model, self.width, bias=False)
        if self.form == "pooled":
            self.w_v = nn.Linear(d_model, self.width, bias=False)
            self.readout = nn.Linear(self.width, 1)

    def forward(self, states: Tensor, mask: BoolTensor) -> tuple[Tensor, Tensor]:
        """Prompt states [batch, position, d_model], mask [batch, position] → v_s [batch], attention [batch, position].

        Attention is zero off the mask: σ of the scores for `mean` and `top_k`, softmax weights for `pooled`, the
        positions' weights for `compete`.

        Raises:
            InputError: a row without any position to read.
        """
        check_mask(mask)
        # One class sends no gradient into the prompt's representation: only the gate learns from v_s.
        states = self._prepared(states.detach(), mask)
        scores = self._scores(states)
        if self.form == "compete":
            return self._compete(scores, mask)
        unsafe = scores[..., UNSAFE]
        if self.form != "pooled":
            return self._average(unsafe, mask)
        logit, weights = self._pool(unsafe, states, mask)
        return torch.sigmoid(logit), weights

    def log_odds(self, states: Tensor, mask: BoolTensor) -> Tensor:
        """The logit of v_s [batch], with its gradient into the states [batch, position, d_model]; `mask` as above.

        For `pooled` it is what the sigmoid is given, so it tells apart what v_s, at 0 or 1 in float32, no longer does.
        """
        check_mask(mask)
        states = self._prepared(states, mask)
        scores = self._scores(states)
        if self.form == "pooled":
            return self._pool(scores[..., UNSAFE], states, mask)[0]
        v_s, _ = self._compete(scores, mask) if self.form == "compete" else self._average(scores[..., UNSAFE], mask)
        return torch.logit(v_s, eps=1e-6)

    def _prepared(self, states: Tensor, mask: BoolTensor) -> Tensor:
        """States in float32, zero off the mask, normalised where no norm has seen them."""
        # Padding may hold anything, even NaN, which a weight of zero would let through.
        states = states.to(torch.float32).masked_fill(~mask.unsqueeze(-1), 0.0)
        return functional.rms_norm(states, (states.shape[-1],)) if self.normalise else states

    def _scores(self, states: Tensor) -> Tensor:
        """a[batch, position, class] = q_class · k_position / sqrt(width)."""
        queries = self.w_q(self.class_embeddings)
        return self.w_k(states) @ queries.T / math.sqrt(self.width)

    def _average(self, scores: Tensor, mask: BoolTensor) -> tuple[Tensor, Tensor]:
        """`mean`, `top_k`: v_s = mean of σ(a) over the prompt, or over its k highest."""
        weights = torch.sigmoid(scores) * mask
        count = mask.sum(dim=1)
        if self.form == "mean":
            return weights.sum(dim=1) / count, weights
        k = min(self.top_k, mask.shape[1])
        # Sigmoids are positive, so the zeros off the mask are the last to be picked.
        return weights.topk(k, dim=1).values.sum(dim=1) / count.clamp(max=k), weights

    def _pool(self, scores: Tensor, states: Tensor, mask: BoolTensor) -> tuple[Tensor, Tensor]:
        """`pooled`: c = Σ softmax(a) W_v h; the logit of v_s is u·c / sqrt(width) + b."""
        weights = _masked_softmax(scores, mask)
        context = self.w_v(torch.einsum("bp,bpd->bd", weights, states))
        logit = context @ self.readout.weight[0] / math.sqrt(self.width) + self.readout.bias[0]
        return logit, weights

    def _compete(self, scores: Tensor, mask: BoolTensor) -> tuple[Tensor, Tensor]:
        """`compete`: p = softmax over the classes at a position; v_s = Σ ω p, ω = softmax of their log-sum-exp."""
        unsafe = torch.softmax(scores, dim=-1)[..., UNSAFE]
        weights = _masked_softmax(torch.logsumexp(scores, dim=-1), mask)
        return (weights * unsafe).sum(dim=1), weights


def check_mask(mask: Tensor) -> None:
    """Refuse a mask [batch, position] with an empty row.

    Raises:
        InputError: naming the first such row.
    """
    filled = mask.any(dim=1)
    if not bool(filled.all()):
        row = int((~filled).nonzero()[0])
        raise InputError(
            f"row {row} of the batch: the prompt has no position that safety attention may read; it is empty"
        )


def _masked_softmax(scores: Tensor, mask: BoolTensor) -> Tensor:
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=1)
