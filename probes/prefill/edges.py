"""The edges of attention and the states by which a prefill overrides a safety token.

The gate's token stands right behind the header and the attacker's tokens behind it. Attention is causal: the state at
the token's position is the same with and without a prefill (tested), so what overrides the token happens at the
positions after it. `edge_effects` cuts what these read of the token, of the prefill and of the request;
`state_effects` moves the state that the token's position has in the clean run to where the prefilled run's reply is
predicted, and back, and gives the token's position its counterpart's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import BoolTensor, Generator, LongTensor, Tensor

from casa_mech.errors import InputError
from casa_mech.omni import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.sites import Edit, Site
from probes.activations.index import query_record
from probes.linear.refusal_direction import refusal_score
from probes.prefill.replies import gate_tokens
from probes.prefill.sweep import AttackedModel, compliance_ids

TOKEN, PREFILL, REQUEST = "prefill reads the token", "prefill reads itself", "prefill reads the request"
EDGES = (TOKEN, PREFILL, REQUEST)
"""Edges from the prefill's positions, where what follows the safety token is computed, to what stands before them."""
CUT = -1
"""In the column `draw`: the edges themselves were cut, not a random set of as many."""
RESTORED, OVERRIDDEN, SWAPPED = (
    "clean run's token into the prefilled run",
    "prefilled run's end into the clean run",
    "counterpart's token into the prefilled run",
)
EXCHANGES = (RESTORED, OVERRIDDEN, SWAPPED)


def edge_sets(batch: OmniBatch, length: int, gated: bool) -> dict[str, BoolTensor]:
    """`EDGES` [batch, reader, read] of prompts that end in `length` prefilled tokens, behind a safety token if `gated`.

    A position's reading of itself is never among them.
    """
    end = batch.inputs["input_ids"].shape[1]
    column = torch.arange(end, device=batch.gate_position.device)
    prefill = (column >= end - length)[None].expand(batch.size, -1)
    token = (column == end - length - 1)[None].expand(batch.size, -1)
    request = torch.stack(list(batch.modality.values())).any(dim=0)
    earlier = (column[None] < column[:, None])[None]
    read = {TOKEN: token, PREFILL: prefill, REQUEST: request}
    return {
        name: prefill[:, :, None] & positions[:, None] & earlier
        for name, positions in read.items()
        if gated or name != TOKEN
    }


def random_edges(edges: BoolTensor, present: BoolTensor, generator: Generator) -> BoolTensor:
    """As many edges of each reader [batch, reader, read], drawn from all that it has to earlier `present` positions.

    Args:
        edges: [batch, reader, read], each to a present, earlier position.
        present: [batch, position], all but padding.
        generator: draws them; on the CPU.
    """
    size = edges.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=edges.device).tril(-1)
    score = torch.rand(edges.shape, generator=generator).to(edges.device).masked_fill(~(earlier & present[:, None]), -1)
    rank = score.argsort(dim=-1, descending=True).argsort(dim=-1)
    return rank < edges.sum(dim=-1, keepdim=True)


def edge_effects(
    system: AttackedModel,
    queries: Sequence[Query],
    length: int,
    openings: LongTensor,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Refusal at the end of a prefill with and without some edges of attention, and without random ones.

    Args:
        system: the model; with a gate its token stands before the prefill.
        queries: requests with `meta["compliance"]`.
        length: tokens of the prefill, at least 1.
        openings: ids that open a refusal (`probes.linear.refusal_direction.opening_ids`).
        draws: random sets of as many edges of each reader, for each of `EDGES`.
        seed: of these.
        batch_size: queries in one forward.

    Returns:
        One row a query, edge set and draw (`CUT`: the set itself): `system, query_id, label, topic, length, edges,
        draw, count` (edges cut) and the log-odds of a refusal's opening `before` and `after`.

    Raises:
        InputError: no prefill, or an answer that is missing or too short.
    """
    if length < 1:
        raise InputError(f"edges of a prefill need one of at least 1 token, not {length}")
    omni, generator = system.omni, torch.Generator().manual_seed(seed)
    forced = _forced(system, queries, length, batch_size)
    tables = []
    for group in omni.batches(queries, batch_size):
        members = [queries[index] for index in group]
        batch = omni.encode(members, [forced[index] for index in group], prefill=False)
        present = batch.inputs["attention_mask"].bool()
        where = {"system": system.name, "length": length, "before": _score(system, batch, openings)}
        for name, edges in edge_sets(batch, length, system.casa is not None).items():
            for draw in (CUT, *range(draws)):
                cut = edges if draw == CUT else random_edges(edges, present, generator)
                after = _score(system, batch, openings, cut=cut)
                count = cut.sum(dim=(1, 2)).cpu().numpy()
                tables.append(_records(members).assign(**where, edges=name, draw=draw, count=count, after=after))
    return pd.concat(tables, ignore_index=True)


def state_effects(
    system: AttackedModel,
    queries: Sequence[Query],
    counterparts: Sequence[Query],
    length: int,
    openings: LongTensor,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Refusal when a state at one position is exchanged between a clean run and a prefilled one, depth by depth.

    Args:
        system: the model. Without a gate the header's last position is in the token's place.
        queries: requests with `meta["compliance"]`.
        counterparts: for each the request of the other label, whose token's state is tried, under its own prefill.
        length: tokens of the prefill, at least 1.
        openings: ids that open a refusal.
        batch_size: queries in one forward.

    Returns:
        One row a query, depth and exchange (one of `EXCHANGES`): `system, query_id, label, topic, length, site,
        exchange` and the log-odds of a refusal's opening in the run that is `patched`, as it was `before`, and in the
        `donor`'s run.

    Raises:
        InputError: no prefill, another number of counterparts, or an answer that is missing or too short.
    """
    if length < 1 or len(counterparts) != len(queries):
        raise InputError(
            f"states are exchanged under a prefill of at least 1 token, not {length}, and every query has a "
            f"counterpart: there are {len(counterparts)} for {len(queries)}"
        )
    omni = system.omni
    forced = _forced(system, queries, length, batch_size)
    others = _forced(system, counterparts, length, batch_size)
    depths: list[Site] = ["embeddings", *range(omni.n_layers)]
    tables = []
    for group in omni.batches(queries, batch_size):
        members = [queries[index] for index in group]
        prefilled = omni.encode(members, [forced[index] for index in group], prefill=False)
        own = [forced[index][: len(forced[index]) - length] for index in group]
        clean = omni.encode(members, own, prefill=False)
        twins = [counterparts[index] for index in group]
        other = omni.encode(twins, [others[index] for index in group], prefill=False)
        token = -1 - length
        # The run that is patched and its column, the donor's run and its column.
        runs = {RESTORED: (prefilled, -1, clean, -1), OVERRIDDEN: (clean, -1, prefilled, -1)}
        runs[SWAPPED] = (prefilled, token, other, token)
        scores = {id(batch): _score(system, batch, openings) for batch in (prefilled, clean, other)}
        donors = {id(batch): capture(omni, batch, depths, "all") for batch in (prefilled, clean, other)}
        for exchange, (receiver, column, donor, donated) in runs.items():
            for site in depths:
                edit = _placed(donors[id(donor)][site][:, donated], column)
                tables.append(
                    _records(members).assign(
                        system=system.name,
                        length=length,
                        site=str(site),
                        exchange=exchange,
                        before=scores[id(receiver)],
                        donor=scores[id(donor)],
                        patched=_score(system, receiver, openings, {site: edit}),
                    )
                )
    return pd.concat(tables, ignore_index=True)


def _forced(system: AttackedModel, queries: Sequence[Query], length: int, batch_size: int) -> list[list[int]]:
    """The gate's token, if there is a gate, and the first `length` ids of each answer."""
    tokens = gate_tokens(system.casa, queries, batch_size) if system.casa else [[]] * len(queries)
    answers = compliance_ids(system.omni, queries, length) if length else [[]] * len(queries)
    return [[*token, *answer] for token, answer in zip(tokens, answers, strict=True)]


def _placed(state: Tensor, column: int) -> Edit:
    """An edit that puts `state` [batch, d_model] at one column."""

    def edit(states: Tensor) -> Tensor:
        states = states.clone()
        states[:, column] = state
        return states

    return edit


def _score(
    system: AttackedModel,
    batch: OmniBatch,
    openings: LongTensor,
    edits: dict[Site, Edit] | None = None,
    cut: BoolTensor | None = None,
) -> np.ndarray:
    """Log-odds [batch] of a refusal's opening after the prompts' last tokens."""
    last = torch.full_like(batch.gate_position, batch.inputs["input_ids"].shape[1] - 1)
    logits = edited_prompt(system.omni, batch, last, edits or {}, cut=cut).logits
    scores: np.ndarray = refusal_score(logits, openings).cpu().numpy()
    return scores


def _records(queries: Sequence[Query]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [query_record(query) for query in queries]
    return pd.DataFrame(rows)
