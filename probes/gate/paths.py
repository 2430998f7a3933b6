"""Path patching: how much of a head's effect goes straight to the gate, and how much through later blocks.

A benign run gets the harmful run's output of one head. Direct: what the head writes reaches the states that are read
at the end, and no block in between (Wang et al., 2023, arXiv 2211.00593). Indirect: the later blocks (and the MLP of
the head's own) get it, and what is read at the end lacks the head's own write. The final norm is not linear, so the two
need not add up to the effect of the whole exchange (`probes.gate.patching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import BoolTensor, Tensor

from casa_mech.casa import Casa
from casa_mech.omni import OmniBatch
from casa_mech.trace.capture import capture
from casa_mech.trace.sites import Edit, Site
from probes.gate.pairs import MatchedPair, pair_spans
from probes.gate.patching import batches_of_pairs, exchanged, head_slice, measured, pair_columns, plus, read_edited

DIRECT, INDIRECT = "direct", "indirect"


def path_effects(casa: Casa, pairs: Sequence[MatchedPair], batch_size: int = 32) -> pd.DataFrame:
    """Direct and indirect effects of every head's harmful output, over the whole prompt, on the benign run.

    Args:
        casa: the trained gate, on its model.
        pairs: those whose prompts do not correspond position by position are left out (see `aligned_pairs`).
        batch_size: pairs in one forward.

    Returns:
        One row a pair, head and path: `pair, topic, site` (`z.<layer>`), `head`, `path` (`DIRECT` or `INDIRECT`), and
        for each of `MEASURES` its change, `delta_<measure>`.

    Raises:
        InputError: no pair that can be aligned.
    """
    tables = [_paths(casa, group) for group in batches_of_pairs(casa.omni, pairs, batch_size)]
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Run:
    """What is changed in a run along one path."""

    layer: int
    """The head's block."""
    exchange: Edit | None
    """Of the heads' outputs in it."""
    added: Tensor
    """[batch, position, d_model], to the states that are read at the end."""

    def edits(self, end: int) -> dict[Site, Edit]:
        """The edits where states are read after block `end`, which may lie before the head's."""
        edits: dict[Site, Edit] = {} if self.exchange is None else {f"z.{self.layer}": self.exchange}
        return edits | ({end: plus(self.added)} if self.layer <= end else {})


def _paths(casa: Casa, pairs: list[MatchedPair]) -> pd.DataFrame:
    omni = casa.omni
    harmful = omni.encode([pair.harmful for pair in pairs], prefill=False)
    benign = omni.encode([pair.benign for pair in pairs], prefill=False)
    whole = pair_spans(harmful, benign)["whole prompt"]
    sites: list[Site] = ["embeddings", *(f"z.{layer}" for layer in range(omni.n_layers))]
    donor, states = (capture(omni, batch, sites, "all") for batch in (harmful, benign))
    embeddings = states["embeddings"]
    unpatched = measured(read_edited(casa, benign, {}, embeddings))
    tables = []
    for layer in range(omni.n_layers):
        site = f"z.{layer}"
        for head in range(omni.n_heads):
            features = head_slice(casa, site, head)
            assert features is not None
            exchange = exchanged(donor[site].flatten(2), whole, features)
            write = _written(casa, layer, (donor[site] - states[site]).flatten(2), features, whole)
            for path in (DIRECT, INDIRECT):
                run = _Run(layer, exchange if path == INDIRECT else None, write if path == DIRECT else -write)
                patched = _read_at_ends(casa, benign, run, embeddings)
                changes = {f"delta_{name}": patched[name] - value for name, value in unpatched.items()}
                where = {"site": site, "head": head, "path": path}
                tables.append(pd.DataFrame({**pair_columns(pairs), **where, **changes}))
    return pd.concat(tables, ignore_index=True)


def _written(casa: Casa, layer: int, change: Tensor, features: slice, span: BoolTensor) -> Tensor:
    """What a `change` of z [batch, position, head · d_head] in one head's `features` adds to the residual stream.

    The output projection itself runs, so that a LoRA on it takes part. It has no bias in Qwen's.
    """
    alone = torch.zeros_like(change)
    alone[..., features] = change[..., features] * span.unsqueeze(-1)
    with torch.no_grad():
        written: Tensor = casa.omni.writers(layer)[0](alone)
    return written


def _read_at_ends(casa: Casa, batch: OmniBatch, run: _Run, embeddings: Tensor) -> dict[str, np.ndarray]:
    """The measures, each with the edits that belong to the block after which it is read.

    Safety attention reads at the gate's layer, the head after the last block.
    """
    last, layer = casa.omni.n_layers - 1, casa.safety_gate.layer
    of_gate = last if layer == "norm" else int(layer)
    values = measured(read_edited(casa, batch, run.edits(of_gate), embeddings))
    if of_gate != last:
        values["logit"] = measured(read_edited(casa, batch, run.edits(last), embeddings))["logit"]
    return values
