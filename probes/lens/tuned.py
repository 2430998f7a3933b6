"""The tuned lens: an affine translator for every depth, from its residual stream into the last depth's terms.

Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens" (arXiv 2303.08112). A translator is
h + A h + b. It starts as the ridge regression of the last depth's states on this depth's, which is solved exactly, and
may then be fitted further to the distance that the paper trains on, KL(model || lens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from casa_mech.divergence import kl_divergence
from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.vocabulary import chunks
from probes.lens.logit import LOGIT_LENS, depth_sites, depth_states, query_index, read_off
from probes.lens.transformer_bridge import check_bridge


@dataclass(frozen=True)
class Translators:
    """An affine map for every depth; the last one's is the identity."""

    weight: Tensor
    """float32 [site, d_model, d_model]: the change A."""
    bias: Tensor
    """float32 [site, d_model]."""

    def __call__(self, states: Tensor) -> Tensor:
        """h + A h + b for states [site, row, d_model]; float32."""
        states = states.to(torch.float32)
        return states + torch.baddbmm(self.bias.unsqueeze(1), states, self.weight.transpose(1, 2))


class _RidgeSums:
    """Running sums of the regression, so that the states of all queries are never in memory at once."""

    def __init__(self, sites: int, width: int) -> None:
        self.count = 0
        self.state = torch.zeros(sites, width, dtype=torch.float64)
        self.change = torch.zeros(sites, width, dtype=torch.float64)
        self.inner = torch.zeros(sites, width, width, dtype=torch.float64)
        self.cross = torch.zeros(sites, width, width, dtype=torch.float64)

    def update(self, states: Tensor) -> None:
        """Add states [site, row, d_model] of every depth."""
        states = states.to("cpu", torch.float64)
        change = states[-1:] - states
        self.count += states.shape[1]
        self.state += states.sum(dim=1)
        self.change += change.sum(dim=1)
        self.inner += states.transpose(1, 2) @ states
        self.cross += states.transpose(1, 2) @ change

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(A [site, d, d], b [site, d]) of least squares with `ridge` times the mean variance as penalty on A."""
        n = self.count
        state, change = self.state / n, self.change / n
        inner = self.inner / n - state.unsqueeze(2) * state.unsqueeze(1)
        cross = self.cross / n - state.unsqueeze(2) * change.unsqueeze(1)
        width = inner.shape[-1]
        scale = inner.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
        penalty = ridge * scale[:, None, None] * torch.eye(width, dtype=torch.float64)
        weight = torch.linalg.solve(inner + penalty, cross).transpose(1, 2)
        return weight, change - (weight @ state.unsqueeze(2)).squeeze(2)


def fit_translators(
    model: TransformerBridge,
    omni: Omni,
    queries: Sequence[Query],
    ridge: float = 0.01,
    kl_epochs: int = 0,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
) -> Translators:
    """Translators of every depth, fitted on all positions of `queries`.

    Args:
        model: `bridge(omni)`.
        omni: the model; whatever is attached to it takes part.
        queries: text (or any) prompts, other than those that the lens is evaluated on.
        ridge: penalty on A, in units of the states' mean variance.
        kl_epochs: passes of Adam on KL(model || lens) after the regression; 0: the regression alone.
        learning_rate: of Adam.
        batch_size: queries in one forward.

    Raises:
        InputError: no queries, a ridge that is not positive, or a bridge of another model.
    """
    check_bridge(model, omni)
    if not queries or ridge <= 0:
        raise InputError(f"translators need queries and a positive ridge; got {len(queries)} queries, ridge {ridge}")
    groups = [[queries[index] for index in group] for group in omni.batches(queries, batch_size)]
    sums = _RidgeSums(omni.n_layers + 1, omni.d_model)
    for group in groups:
        sums.update(_real_states(model, omni.encode(group, prefill=False)))
    weight, bias = (solution.to(omni.device, torch.float32) for solution in sums.solve(ridge))
    weight[-1], bias[-1] = 0, 0
    translators = Translators(weight, bias)
    for _ in range(kl_epochs):
        translators = _descend(model, omni, groups, translators, learning_rate)
    return translators


def _real_states(model: TransformerBridge, batch: OmniBatch) -> Tensor:
    """States [site, row, d_model] of every depth at all positions but padding."""
    return depth_states(model, batch)[:, batch.inputs["attention_mask"].bool()]


def _descend(
    model: TransformerBridge, omni: Omni, groups: Sequence[Sequence[Query]], start: Translators, rate: float
) -> Translators:
    """Translators after one pass of Adam over the batches, on the mean KL of all depths but the last."""
    weight, bias = (parameter[:-1].clone().requires_grad_() for parameter in (start.weight, start.bias))
    adam = torch.optim.Adam([weight, bias], lr=rate)
    for group in groups:
        states = _real_states(model, omni.encode(group, prefill=False))
        adam.zero_grad()
        for part in _parts(omni, states):
            here = states[:, part]
            distance = _divergence(read_off(omni, here[-1]), read_off(omni, Translators(weight, bias)(here[:-1])))
            (distance.mean() * (here.shape[1] / states.shape[1])).backward(inputs=[weight, bias])
        adam.step()
    return Translators(
        torch.cat([weight.detach(), torch.zeros_like(start.weight[-1:])]),
        torch.cat([bias.detach(), torch.zeros_like(start.bias[-1:])]),
    )


def _parts(omni: Omni, states: Tensor) -> Iterator[slice]:
    """Slices of the rows of `states` [site, row, d_model], the logits of all sites a chunk."""
    return chunks(states.shape[1], len(states) * omni.vocab_size)


def _divergence(truth: Tensor, lens: Tensor) -> Tensor:
    """KL(model || lens) in nats [site, row] of logits [row, vocab] and [site, row, vocab]."""
    return kl_divergence(functional.log_softmax(truth, dim=-1), functional.log_softmax(lens, dim=-1))


def lens_quality(
    model: TransformerBridge,
    omni: Omni,
    queries: Sequence[Query],
    lenses: Mapping[str, Translators],
    batch_size: int = 32,
) -> pd.DataFrame:
    """KL of the model's own prediction from that of the logit lens and of tuned ones, at every depth.

    Args:
        model: `bridge(omni)`. omni: the model. queries: any mixture. batch_size: queries in one forward.
        lenses: translators by the name of their lens.

    Returns:
        One row a lens, site and query: the query's index columns, `lens, site, depth` and `kl`, the mean over the
        prompt's positions of KL(model || lens) in nats.

    Raises:
        InputError: a bridge of another model.
    """
    check_bridge(model, omni)
    sites = list(map(str, depth_sites(omni.n_layers)))
    divergence = {name: np.empty((len(sites), len(queries))) for name in (LOGIT_LENS, *lenses)}
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[index] for index in group], prefill=False)
        mask = batch.inputs["attention_mask"].bool()
        row = mask.nonzero()[:, 0].cpu().numpy()
        states = depth_states(model, batch)[:, mask]
        with torch.no_grad():
            distances: dict[str, list[np.ndarray]] = {name: [] for name in divergence}
            for part in _parts(omni, states):
                here = states[:, part]
                truth = read_off(omni, here[-1])
                for name, pieces in distances.items():
                    logits = read_off(omni, lenses[name](here) if name in lenses else here)
                    pieces.append(_divergence(truth, logits).cpu().numpy())
            for name, pieces in distances.items():
                distance = np.concatenate(pieces, axis=1)
                total = np.stack([np.bincount(row, weights=values, minlength=len(group)) for values in distance])
                divergence[name][:, group] = total / np.bincount(row, minlength=len(group))
    index = query_index(queries)
    tables = [
        index.assign(lens=name, site=site, depth=depth, kl=values[depth])
        for name, values in divergence.items()
        for depth, site in enumerate(sites)
    ]
    return pd.concat(tables, ignore_index=True)
