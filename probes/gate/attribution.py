"""Direct logit attribution: the share of each head, each MLP and the gate in the safety tokens' logit difference.

The residual stream at the gate's position is a sum of what the embeddings, the heads and the MLPs wrote. With the final
norm's scale held at the value that it has, the head's logits are linear in that sum, so the difference (unsafe minus
safe) is the sum of one number for each of them; what the gate's rule adds comes on top. After the decomposition of
"A mathematical framework for transformer circuits" (Elhage et al., 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from casa_mech.casa import Casa
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.omni import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.patch import edited_prompt
from probes.activations.index import query_record

GATE, EMBEDDINGS = "safety attention", "embeddings"


@dataclass(frozen=True)
class Attribution:
    """The safety tokens' logit difference of each query as a sum over components."""

    contributions: np.ndarray
    """[query, component], in logits; each row sums to `difference`."""
    components: tuple[str, ...]
    """`"embeddings"`, `"head 0.0"` (block.head), `"mlp 0"`, ..., `"safety attention"` (what the rule adds because of
    v_s)."""
    difference: np.ndarray
    """[query]: the rewritten logit of the unsafe token minus that of the safe one."""
    index: pd.DataFrame
    """One row a query, `query_id, label, topic`."""

    def table(self, seed: int = 0) -> pd.DataFrame:
        """Mean contribution by label with cluster-bootstrap intervals: `component, label, mean, low, high, n`."""
        rows = []
        for label, group in self.index.groupby("label", sort=False):
            topics = group["topic"].tolist()
            for number, component in enumerate(self.components):
                mean, low, high = mean_interval(self.contributions[group.index, number], topics, seed)
                rows.append({"component": component, "label": label, "mean": mean, "low": low, "high": high})
                rows[-1]["n"] = len(group)
        return pd.DataFrame(rows)


def attribute_token_difference(casa: Casa, queries: Sequence[Query], batch_size: int = 32) -> Attribution:
    """The safety tokens' logit difference of each query, component by component, at the gate's position.

    A prefill is left out.
    """
    omni, n_layers = casa.omni, casa.omni.n_layers
    names = [EMBEDDINGS]
    for layer in range(n_layers):
        names += [f"head {layer}.{head}" for head in range(omni.n_heads)] + [f"mlp {layer}"]
    names.append(GATE)
    contributions = np.empty((len(queries), len(names)))
    difference = np.empty(len(queries))
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[index] for index in group], prefill=False)
        reading = edited_prompt(omni, batch, batch.gate_position, {}, casa.safety_gate).reading
        assert reading is not None
        rewritten, own = (pair[:, 1] - pair[:, 0] for pair in (reading.pair.double(), reading.raw_pair.double()))
        summands = torch.cat([_contributions(casa, batch), (rewritten - own).unsqueeze(1)], dim=1)
        contributions[group] = summands.cpu().numpy()
        difference[group] = rewritten.cpu().numpy()
    index = pd.DataFrame([query_record(query) for query in queries])
    return Attribution(contributions, tuple(names), difference, index)


def _contributions(casa: Casa, batch: OmniBatch) -> Tensor:
    """Contributions [batch, component] of all components of the language model, in float64."""
    omni = casa.omni
    sites = [f"{kind}.{layer}" for layer in range(omni.n_layers) for kind in ("z", "attention", "mlp")]
    states = capture(omni, batch, ["embeddings", omni.n_layers - 1, "norm", *sites], "last")
    written = [states["embeddings"].double().unsqueeze(1)]
    for layer in range(omni.n_layers):
        heads = _head_outputs(omni.writers(layer)[0], states[f"z.{layer}"]).double()
        written.append(heads * _gain(heads.sum(dim=1), states[f"attention.{layer}"]).unsqueeze(1))
        written.append(states[f"mlp.{layer}"].double().unsqueeze(1))
    safe, unsafe = casa.token_ids
    head = omni.head.weight.detach().double()
    gain = _gain(states[omni.n_layers - 1].double(), states["norm"])
    return torch.einsum("bcd,bd->bc", torch.cat(written, dim=1), gain * (head[unsafe] - head[safe]))


def _gain(before: Tensor, after: Tensor) -> Tensor:
    """What an RMSNorm multiplied each feature by, or ones where there is none: held fixed, it shares `after` out."""
    return torch.where(before.abs() > 0, after.double() / before, torch.ones_like(before))


def _head_outputs(projection: torch.nn.Module, z: Tensor) -> Tensor:
    """Each head's output in the residual stream [batch, head, d_model], from z [batch, head, d_head].

    The projection itself runs, one head at a time, so that a LoRA on it takes part. It has no bias in Qwen's.
    """
    n_heads = z.shape[1]
    alone = z.unsqueeze(1) * torch.eye(n_heads, dtype=z.dtype, device=z.device)[None, :, :, None]
    with torch.no_grad():
        return projection(alone.flatten(2))
