"""Activation patching on the gate: which states, at which layer and position, carry harm to v_s and to the token.

A pair's harmful and benign run exchange states at one place and span; what v_s and the language model's own logit
difference (unsafe minus safe) make of it is the causal effect of those states. Also the ablation of directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import BoolTensor, Tensor

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.stats import cluster_of
from casa_mech.omni import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.gate import GateReading
from casa_mech.trace.patch import Edit, edited_prompt
from casa_mech.trace.sites import Site
from probes.gate.pairs import SPANS, Pair, aligned_pairs, pair_spans

INSERT, REMOVE = "insert harm", "remove harm"
"""The benign run gets the harmful run's states (are they enough?), and the other way round (are they needed?)."""
_WHERE = ["direction", "site", "head", "span"]


@dataclass(frozen=True)
class Target:
    """What is exchanged: a site, the span of positions (one of `SPANS`), and at `z.<layer>` one head or all."""

    site: Site
    span: str
    head: int | None = None


@dataclass(frozen=True)
class PatchEffects:
    """Effects of exchanging states.

    effects: one row a pair, direction and target, with columns `pair` (the harmful query's id), `topic`, `direction`,
        `site, head, span` (`head` -1 where all of the site was exchanged), and each of `v_s` and `logit` (the
        language model's own unsafe minus safe, before the gate) in the receiving run, in the giving run (`_donor`) and
        in the patched one (`_patched`).
    """

    effects: pd.DataFrame

    def deltas(self) -> pd.DataFrame:
        """`effects` with `delta_v_s` and `delta_logit`: the patched run minus the receiving one."""
        changes = {f"delta_{name}": self.effects[f"{name}_patched"] - self.effects[name] for name in ("v_s", "logit")}
        return self.effects.assign(**changes)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Mean effects with cluster-bootstrap intervals (by topic).

        Returns:
            Columns `direction, site, head, span, n`, and `mean, low, high` after `delta_v_s_` and
            `delta_logit_`; `gap_v_s` and `gap_logit`: the mean difference between the two unpatched runs, which a full
            exchange would make.
        """
        rows = []
        for where, group in self.deltas().groupby(_WHERE, sort=False):
            row: dict[str, Any] = {**dict(zip(_WHERE, where, strict=True)), "n": len(group)}
            for name in ("v_s", "logit"):
                row[f"gap_{name}"] = float((group[f"{name}_donor"] - group[name]).mean())
                found = mean_interval(group[f"delta_{name}"].to_numpy(), group["topic"].tolist(), seed)
                row |= dict(zip((f"delta_{name}_{part}" for part in ("mean", "low", "high")), found, strict=True))
            rows.append(row)
        return pd.DataFrame(rows)


def default_targets(n_layers: int, n_heads: int) -> list[Target]:
    """The residual stream at every depth by span; every head, attention and MLP over the whole prompt."""
    depths: list[Site] = ["embeddings", *range(n_layers)]
    targets = [Target(depth, span) for span in SPANS for depth in depths]
    for layer in range(n_layers):
        targets += [Target(f"z.{layer}", "whole prompt", head) for head in range(n_heads)]
        targets += [Target(f"attention.{layer}", "whole prompt"), Target(f"mlp.{layer}", "whole prompt")]
    return targets


def patch_effects(
    casa: Casa, pairs: Sequence[Pair], targets: Sequence[Target] | None = None, batch_size: int = 32
) -> PatchEffects:
    """Exchange states between the two runs of every pair, one target at a time, in both directions.

    Args:
        casa: the trained gate, on its model.
        pairs: those whose prompts do not correspond position by position are left out (see `aligned_pairs`).
        targets: default `default_targets`. A pair without the target's span has no row for it.
        batch_size: pairs in one forward.

    Raises:
        InputError: no pair that can be aligned, an unknown span, or a site or head that the model does not have.
    """
    omni = casa.omni
    if targets is None:
        targets = default_targets(omni.n_layers, omni.model.config.text_config.num_attention_heads)
    unknown = [target.span for target in targets if target.span not in SPANS]
    if unknown:
        raise InputError(f"no span {unknown[0]!r}; use {', '.join(SPANS)}")
    kept = aligned_pairs(omni, pairs)
    # Pairs of one length together: padding costs as much as prompt.
    order = [kept[index] for group in omni.batches([pair.harmful for pair in kept], len(kept)) for index in group]
    tables = [_exchange(casa, order[start : start + batch_size], targets) for start in range(0, len(order), batch_size)]
    return PatchEffects(pd.concat(tables, ignore_index=True))


def ablate_directions(
    casa: Casa, queries: Sequence[Query], directions: np.ndarray, batch_size: int = 32
) -> pd.DataFrame:
    """What the gate says when a direction is projected out of the residual stream wherever something is written to it.

    x ← x - r̂ r̂ᵀ x at the embeddings and at every attention, MLP and block output (docs/method.md §5.4).

    Args:
        casa: the trained gate.
        queries: prompts; a prefill is left out.
        directions: [direction, d_model], of any length but zero; one run each, beside one without any.

    Returns:
        One row a query and run: `query_id, label, topic, ablated` (-1: nothing, else the direction's index), `v_s`,
        `logit` (the language model's own unsafe minus safe) and `unsafe` (the decision).

    Raises:
        InputError: directions of another width, or a zero one.
    """
    omni = casa.omni
    vectors = torch.as_tensor(np.atleast_2d(directions), dtype=torch.float32, device=omni.device)
    if vectors.shape[1] != omni.d_model or not bool(vectors.norm(dim=1).gt(0).all()):
        raise InputError(f"directions {tuple(vectors.shape)} must be [direction, {omni.d_model}] and not zero")
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    sites: list[Site] = ["embeddings"]
    for layer in range(omni.n_layers):
        sites += [f"attention.{layer}", f"mlp.{layer}", layer]
    rows: list[dict[str, Any]] = []
    for group in omni.batches(queries, batch_size):
        chosen = [queries[index] for index in group]
        batch = omni.encode(chosen, prefill=False)
        embeddings = capture(omni, batch, ["embeddings"], "all")["embeddings"]
        for index in range(-1, len(vectors)):
            edits = {site: _without(vectors[index]) for site in sites} if index >= 0 else {}
            reading = _reading(casa, batch, edits, embeddings)
            unsafe = (reading.pair[:, 1] > reading.pair[:, 0]).tolist()
            found = zip(chosen, reading.v_s.tolist(), _difference(reading).tolist(), unsafe, strict=True)
            rows += [
                {"query_id": query.id, "label": query.label, "topic": str(cluster_of(query)), "ablated": index}
                | {"v_s": v_s, "logit": logit, "unsafe": decision}
                for query, v_s, logit, decision in found
            ]
    return pd.DataFrame(rows)


def _exchange(casa: Casa, pairs: list[Pair], targets: Sequence[Target]) -> pd.DataFrame:
    omni = casa.omni
    harmful = omni.encode([pair.harmful for pair in pairs], prefill=False)
    benign = omni.encode([pair.benign for pair in pairs], prefill=False)
    spans = pair_spans(harmful, benign)
    held = [
        capture(omni, batch, ["embeddings", *(target.site for target in targets)], "all") for batch in (harmful, benign)
    ]
    readings = [
        _reading(casa, batch, {}, states["embeddings"]) for batch, states in zip((harmful, benign), held, strict=True)
    ]
    tables = []
    for direction, receiver, to, giver in ((INSERT, benign, 1, 0), (REMOVE, harmful, 0, 1)):
        given, own = held[giver], held[to]["embeddings"]
        plain, other = readings[to], readings[giver]
        unpatched = {**_columns(plain, ""), **_columns(other, "_donor")}
        for target in targets:
            span = spans[target.span]
            there = span.any(dim=1).cpu().numpy()
            if not there.any():
                continue
            # Heads have an axis of their own in what is captured, and lie side by side where they are edited.
            edit = exchanged(given[target.site].flatten(2), span, _head_slice(casa, target))
            patched = _columns(_reading(casa, receiver, {target.site: edit}, own), "_patched")
            table = pd.DataFrame(
                {
                    "pair": [pair.harmful.id for pair in pairs],
                    "topic": [str(cluster_of(pair.harmful)) for pair in pairs],
                    "direction": direction,
                    "site": str(target.site),
                    "head": -1 if target.head is None else target.head,
                    "span": target.span,
                    **unpatched,
                    **patched,
                }
            )
            tables.append(table[there])
    return pd.concat(tables, ignore_index=True)


def _head_slice(casa: Casa, target: Target) -> slice | None:
    if target.head is None:
        return None
    config = casa.omni.model.config.text_config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not str(target.site).startswith("z.") or not 0 <= target.head < config.num_attention_heads:
        raise InputError(f"no head {target.head} at {target.site}: z.<layer> has 0..{config.num_attention_heads - 1}")
    return slice(target.head * size, (target.head + 1) * size)


def exchanged(donor: Tensor, span: BoolTensor, part: slice | None = None) -> Edit:
    """States replaced by `donor` [batch, position, size] within `span` [batch, position], or a `part` of their size."""

    def edit(states: Tensor) -> Tensor:
        if part is None:
            return torch.where(span.unsqueeze(-1), donor, states)
        states = states.clone()
        states[..., part] = torch.where(span.unsqueeze(-1), donor[..., part], states[..., part])
        return states

    return edit


def _without(direction: Tensor) -> Edit:
    """States with the unit `direction` [d_model] projected out."""

    def edit(states: Tensor) -> Tensor:
        unit = direction.to(states.dtype)
        return states - (states @ unit).unsqueeze(-1) * unit

    return edit


def _reading(casa: Casa, batch: OmniBatch, edits: dict[Site, Edit], embeddings: Tensor) -> GateReading:
    gate, position = casa.safety_gate, batch.gate_position
    reading = edited_prompt(casa.omni, batch, position, edits, gate, embeddings=embeddings).reading
    assert reading is not None
    return reading


def _difference(reading: GateReading) -> Tensor:
    return reading.raw_pair[:, 1] - reading.raw_pair[:, 0]


def _columns(reading: GateReading, suffix: str) -> dict[str, np.ndarray]:
    return {
        f"v_s{suffix}": reading.v_s.float().cpu().numpy(),
        f"logit{suffix}": _difference(reading).float().cpu().numpy(),
    }
