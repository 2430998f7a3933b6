"""The logit lens: the residual stream at every depth, read with the model's own final norm and head.

After nostalgebraist (2020); with translators (`probes.lens.tuned`) it is the tuned lens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.sites import Site
from casa_mech.vocabulary import chunks
from probes.activations.index import query_columns
from probes.lens.transformer_bridge import check_bridge, hook_name

LOGIT_LENS, TUNED_LENS = "logit lens", "tuned lens"
QUERY_COLUMNS = ["query_id", "label", "surface", "topic", "split"]


class Translate(Protocol):
    """A map between a depth's residual stream and the final norm, such as the tuned lens's."""

    def __call__(self, states: Tensor) -> Tensor:
        """States [site, row, d_model] at every depth → the same shape, in the last depth's terms."""


@dataclass(frozen=True)
class Trajectory:
    """The two safety tokens, as read off every depth at the gate's position."""

    lens: str
    """Its name, such as "logit lens" or "tuned lens"."""
    sites: tuple[str, ...]
    """"embeddings", "0", "1", ...; the last is the model's own answer."""
    pair: np.ndarray
    """float32 [site, query, 2]: logits (safe, unsafe)."""
    mass: np.ndarray
    """float32 [site, query]: the share of all probability that the two tokens have."""
    index: pd.DataFrame
    """One row a query, columns `QUERY_COLUMNS`."""

    @property
    def difference(self) -> np.ndarray:
        """Unsafe minus safe logit [site, query], before the gate's own rewriting."""
        return self.pair[..., 1] - self.pair[..., 0]

    def table(self) -> pd.DataFrame:
        """One row a site and query: the index, `lens, site, depth, difference, mass`."""
        tables = [
            self.index.assign(lens=self.lens, site=site, depth=depth, difference=difference, mass=mass)
            for depth, (site, difference, mass) in enumerate(zip(self.sites, self.difference, self.mass, strict=True))
        ]
        return pd.concat(tables, ignore_index=True)


def depth_sites(n_layers: int) -> list[Site]:
    """Sites of the residual stream at every depth: before block 0, then after each block."""
    return ["embeddings", *range(n_layers)]


def logit_lens(
    model: TransformerBridge,
    casa: Casa,
    queries: Sequence[Query],
    translate: Translate | None = None,
    batch_size: int = 32,
    name: str = "",
) -> Trajectory:
    """The safety tokens' logits at the gate's position, read off the residual stream at every depth.

    Args:
        model: `bridge(casa.omni)`, made with the gate attached, so that LoRA and the tokens' rows take part.
        casa: the gate.
        queries: any mixture of text, image and audio; a prefill is left out.
        translate: translators of the tuned lens; none: the logit lens.
        batch_size: queries in one forward.
        name: of the lens; default "tuned lens" with translators, else "logit lens".

    Raises:
        InputError: no queries, or a bridge that was made of another model or before the gate was attached.
    """
    omni = casa.omni
    check_bridge(model, omni)
    if not queries:
        raise InputError("the lens needs at least one query")
    sites = depth_sites(omni.n_layers)
    pair = np.empty((len(sites), len(queries), 2), np.float32)
    mass = np.empty((len(sites), len(queries)), np.float32)
    tokens = torch.tensor(casa.token_ids, device=omni.device)
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[index] for index in group], prefill=False)
        states = depth_states(model, batch)[:, torch.arange(batch.size), batch.gate_position]
        for part in chunks(batch.size, len(sites) * omni.vocab_size):
            here, members = states[:, part], group[part]
            logits = read_off(omni, here if translate is None else translate(here))
            pair[:, members] = logits[..., tokens].cpu().numpy()
            mass[:, members] = torch.softmax(logits, dim=-1)[..., tokens].sum(dim=-1).cpu().numpy()
    return Trajectory(
        name or (LOGIT_LENS if translate is None else TUNED_LENS),
        tuple(map(str, sites)),
        pair,
        mass,
        query_index(queries),
    )


def depth_states(model: TransformerBridge, batch: OmniBatch) -> Tensor:
    """The residual stream [site, batch, position, d_model] at every depth (`depth_sites`)."""
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str) -> None:
        seen[name] = value

    def last(value: Tensor, hook: Any) -> Tensor:
        return value[:, -1:]  # the head has nothing to score

    names = [hook_name(site) for site in depth_sites(model.cfg.n_layers)]
    hooks = [*((name, partial(keep, name=name)) for name in names), ("unembed.hook_in", last)]
    inputs = dict(batch.inputs)
    with torch.no_grad():
        model.run_with_hooks(inputs.pop("input_ids"), fwd_hooks=hooks, use_cache=False, **inputs)
    return torch.stack([seen[name] for name in names])


def read_off(omni: Omni, states: Tensor) -> Tensor:
    """Float32 logits [..., vocab] of states [..., d_model] under the model's own final norm and head."""
    return omni.head(omni.norm(states.to(omni.dtype))).to(torch.float32)


def query_index(queries: Sequence[Query]) -> pd.DataFrame:
    """One row a query with `QUERY_COLUMNS`; the empty string where the query's maker said nothing."""
    return pd.DataFrame([query_columns(query) for query in queries], columns=QUERY_COLUMNS)
