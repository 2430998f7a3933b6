"""Activation patching on the gate: which states, at which layer and position, carry harm to v_s and to the token.

A matched pair's harmful and benign runs exchange states at one site and span; the change of the log-odds of v_s (v_s
itself saturates) and of the language model's own logit difference (unsafe minus safe) is the causal effect of those
states. Beside it stands what attribution patching makes of it. Also the ablation of directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import BoolTensor, Tensor

from casa_mech.casa import Casa
from casa_mech.casa.open_gate import OpenGate, OpenReading
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.stats import cluster_of
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.sites import Edit, Site
from probes.activations.index import query_record
from probes.gate.pairs import SPANS, MatchedPair, aligned_pairs, pair_spans

INSERT, REMOVE = "insert harm", "remove harm"
"""The benign run gets the harmful run's states (are they sufficient?), and the reverse (are they necessary?)."""
MEASURES = ("log_odds", "logit", "v_s")
"""What is read in a run: the log-odds of v_s, the language model's own logit of the unsafe token minus that of the safe
one (before the gate), and v_s."""
ESTIMATED = ("log_odds", "logit")
"""The measures that attribution patching estimates; v_s has no slope where it saturates."""
_WHERE = ["direction", "site", "head", "span"]


@dataclass(frozen=True)
class Target:
    """States that are exchanged."""

    site: Site
    span: str
    """Which positions: one of `SPANS`."""
    head: int | None = None
    """At `z.<layer>` one head; None: all of the site."""


@dataclass(frozen=True)
class PatchEffects:
    """Effects of exchanging states."""

    effects: pd.DataFrame
    """One row a pair, direction and target: `pair` (the harmful query's id), `topic`, `direction`, `site, head, span`
    (`head` -1 where all of the site was exchanged), and each of `MEASURES` in the receiving run, in the donor run
    (`_donor`) and in the patched one (`_patched`); for `ESTIMATED` also the change that attribution patching predicts
    (`_estimated`): the slope of the receiving run times the difference of the states (Syed et al., 2023,
    arXiv 2310.10348)."""

    def deltas(self) -> pd.DataFrame:
        """`effects` with `delta_` and the measure, for each: the patched run minus the receiving one."""
        changes = {f"delta_{name}": self.effects[f"{name}_patched"] - self.effects[name] for name in MEASURES}
        return self.effects.assign(**changes)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Mean effects with cluster-bootstrap intervals (by topic).

        Returns:
            Columns `direction, site, head, span, n`; for each of `MEASURES` `mean, low, high` after `delta_<measure>_`,
            and `gap_<measure>`: the mean difference between the two unpatched runs, which a full exchange would make.
        """
        rows = []
        for where, group in self.deltas().groupby(_WHERE, sort=False):
            row: dict[str, Any] = {**dict(zip(_WHERE, where, strict=True)), "n": len(group)}
            for name in MEASURES:
                row[f"gap_{name}"] = float((group[f"{name}_donor"] - group[name]).mean())
                mean, low, high = mean_interval(group[f"delta_{name}"].to_numpy(), group["topic"].tolist(), seed)
                row |= {f"delta_{name}_mean": mean, f"delta_{name}_low": low, f"delta_{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows)


def default_targets(n_layers: int, n_heads: int) -> list[Target]:
    """Targets: the residual stream at every depth by span; every head, attention and MLP over the whole prompt."""
    depths: list[Site] = ["embeddings", *range(n_layers)]
    targets = [Target(depth, span) for span in SPANS for depth in depths]
    for layer in range(n_layers):
        targets += [Target(f"z.{layer}", "whole prompt", head) for head in range(n_heads)]
        targets += [Target(f"attention.{layer}", "whole prompt"), Target(f"mlp.{layer}", "whole prompt")]
    return targets


def patch_effects(
    casa: Casa, pairs: Sequence[MatchedPair], targets: Sequence[Target] | None = None, batch_size: int = 32
) -> PatchEffects:
    """Effects of exchanging states between the two runs of every pair, one target at a time, in both directions.

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
        targets = default_targets(omni.n_layers, omni.n_heads)
    unknown = [target.span for target in targets if target.span not in SPANS]
    if unknown:
        raise InputError(f"no span {unknown[0]!r}; use {', '.join(SPANS)}")
    tables = [_exchange(casa, group, targets) for group in batches_of_pairs(omni, pairs, batch_size)]
    return PatchEffects(pd.concat(tables, ignore_index=True))


def batches_of_pairs(omni: Omni, pairs: Sequence[MatchedPair], batch_size: int) -> Iterator[list[MatchedPair]]:
    """Those of `pairs` that can be aligned, in groups of `batch_size` at most.

    Raises:
        InputError: not one pair can be.
    """
    aligned = aligned_pairs(omni, pairs)
    # Pairs of one length together: padding costs as much as prompt.
    groups = omni.batches([pair.harmful for pair in aligned], len(aligned))
    order = [aligned[index] for group in groups for index in group]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def ablate_directions(
    casa: Casa, queries: Sequence[Query], directions: np.ndarray, batch_size: int = 32
) -> pd.DataFrame:
    """The gate's readings while a direction is projected out of the residual stream wherever something writes to it.

    x ← x - r̂ r̂ᵀ x at the embeddings and at every attention, MLP and block output (docs/method.md §5.4).

    Args:
        casa: the trained gate.
        queries: prompts; a prefill is left out.
        directions: [direction, d_model], of any length but zero; one run each, beside one without any.
        batch_size: queries in one forward.

    Returns:
        One row a query and run: `query_id, label, topic, ablated` (-1: nothing, else the direction's index),
        `MEASURES` and `unsafe` (the decision).

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
        members = [queries[index] for index in group]
        batch = omni.encode(members, prefill=False)
        embeddings = capture(omni, batch, ["embeddings"], "all")["embeddings"]
        for index in range(-1, len(vectors)):
            edits = {site: _without(vectors[index]) for site in sites} if index >= 0 else {}
            reading = read_edited(casa, batch, edits, embeddings)
            unsafe = (reading.pair[:, 1] > reading.pair[:, 0]).tolist()
            table = pd.DataFrame(measured(reading)).assign(ablated=index, unsafe=unsafe)
            records = table.to_dict("records")
            rows += [{**query_record(query), **record} for query, record in zip(members, records, strict=True)]
    return pd.DataFrame(rows)


def _exchange(casa: Casa, pairs: list[MatchedPair], targets: Sequence[Target]) -> pd.DataFrame:
    omni = casa.omni
    harmful = omni.encode([pair.harmful for pair in pairs], prefill=False)
    benign = omni.encode([pair.benign for pair in pairs], prefill=False)
    spans = pair_spans(harmful, benign)
    sites: list[Site] = ["embeddings", *(target.site for target in targets)]
    harmful_states, benign_states = (capture(omni, batch, sites, "all") for batch in (harmful, benign))
    harmful_reading = measured(read_edited(casa, harmful, {}, harmful_states["embeddings"]))
    benign_reading = measured(read_edited(casa, benign, {}, benign_states["embeddings"]))
    tables = []
    for direction, receiver, states, reading, donor_states, donor_reading in (
        (INSERT, benign, benign_states, benign_reading, harmful_states, harmful_reading),
        (REMOVE, harmful, harmful_states, harmful_reading, benign_states, benign_reading),
    ):
        embeddings = states["embeddings"]
        unpatched = {**reading, **{f"{name}_donor": value for name, value in donor_reading.items()}}
        slopes = _slopes(casa, receiver, states)
        for target in targets:
            span = spans[target.span]
            has_span = span.any(dim=1).cpu().numpy()
            if not has_span.any():
                continue
            # Heads have an axis of their own in what is captured, and lie side by side where they are edited.
            donor, features = donor_states[target.site].flatten(2), head_slice(casa, target.site, target.head)
            edit = exchanged(donor, span, features)
            patched = measured(read_edited(casa, receiver, {target.site: edit}, embeddings))
            change = (donor - states[target.site].flatten(2)) * span.unsqueeze(-1)
            estimated = {
                f"{name}_estimated": (slopes[name][target.site] * change)[..., features or slice(None)].sum(dim=(1, 2))
                for name in ESTIMATED
            }
            table = pd.DataFrame(
                {
                    **pair_columns(pairs),
                    "direction": direction,
                    "site": str(target.site),
                    "head": -1 if target.head is None else target.head,
                    "span": target.span,
                    **unpatched,
                    **{f"{name}_patched": value for name, value in patched.items()},
                    **{name: value.float().cpu().numpy() for name, value in estimated.items()},
                }
            )
            tables.append(table[has_span])
    return pd.concat(tables, ignore_index=True)


def pair_columns(pairs: Sequence[MatchedPair]) -> dict[str, list[str]]:
    """`pair` (the harmful query's id) and `topic` of each pair, as columns."""
    return {
        "pair": [pair.harmful.id for pair in pairs],
        "topic": [str(cluster_of(pair.harmful)) for pair in pairs],
    }


def _slopes(casa: Casa, batch: OmniBatch, states: Mapping[Site, Tensor]) -> dict[str, dict[Site, Tensor]]:
    """Gradients of each of `ESTIMATED` in the states of each site [batch, position, size], from one forward."""
    added = {site: torch.zeros_like(value.flatten(2)).requires_grad_() for site, value in states.items()}
    edits = {site: plus(leaf) for site, leaf in added.items()}
    reading = read_edited(casa, batch, edits, states["embeddings"], gradient=True)
    sums = {"log_odds": reading.log_odds.sum(), "logit": _difference(reading).sum()}
    slopes = {}
    for name in ESTIMATED:
        leaves = torch.autograd.grad(sums[name], list(added.values()), retain_graph=True, materialize_grads=True)
        slopes[name] = dict(zip(added, leaves, strict=True))
    return slopes


def head_slice(casa: Casa, site: Site, head: int | None) -> slice | None:
    """The features of `head` at the site `z.<layer>`; None where `head` is.

    Raises:
        InputError: another site, or a head that the model does not have.
    """
    if head is None:
        return None
    n_heads, size = casa.omni.n_heads, casa.omni.d_head
    if not str(site).startswith("z.") or not 0 <= head < n_heads:
        raise InputError(f"no head {head} at {site}: z.<layer> has 0..{n_heads - 1}")
    return slice(head * size, (head + 1) * size)


def exchanged(donor: Tensor, span: BoolTensor, features: slice | None = None) -> Edit:
    """An edit that puts `donor` [batch, position, size] in place of the states within `span` [batch, position].

    `features`: only these of the last axis, such as one head's; None: all.
    """

    def edit(states: Tensor) -> Tensor:
        if features is None:
            return torch.where(span.unsqueeze(-1), donor, states)
        states = states.clone()
        states[..., features] = torch.where(span.unsqueeze(-1), donor[..., features], states[..., features])
        return states

    return edit


def plus(added: Tensor) -> Edit:
    """An edit that adds `added` to the states."""
    return lambda states: states + added.to(states.dtype)


def _without(direction: Tensor) -> Edit:
    """An edit that projects the unit `direction` [d_model] out of the states."""

    def edit(states: Tensor) -> Tensor:
        unit = direction.to(states.dtype)
        return states - (states @ unit).unsqueeze(-1) * unit

    return edit


def read_edited(
    casa: Casa, batch: OmniBatch, edits: Mapping[Site, Edit], embeddings: Tensor, gradient: bool = False
) -> OpenReading:
    """The gate's reading of `batch` with `edits` put in (see `edited_prompt`)."""
    gate, position = OpenGate(casa), batch.gate_position
    reading = edited_prompt(casa.omni, batch, position, edits, gate, embeddings=embeddings, gradient=gradient).reading
    assert isinstance(reading, OpenReading)
    return reading


def measured(reading: OpenReading) -> dict[str, np.ndarray]:
    """`MEASURES` of a reading, each [batch]."""
    values = {"log_odds": reading.log_odds, "logit": _difference(reading), "v_s": reading.v_s}
    return {name: values[name].float().cpu().numpy() for name in MEASURES}


def _difference(reading: OpenReading) -> Tensor:
    return reading.raw_pair[:, 1] - reading.raw_pair[:, 0]
