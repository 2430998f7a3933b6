"""Attention heads through TransformerLens: the gate without each of them, and their attention patterns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import LongTensor, Tensor
from transformer_lens.model_bridge import TransformerBridge

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.hypothesis import holm, permutation_test
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.gate import GateReading, precise_pair
from probes.gate.positions import ROLES, position_roles
from probes.lens.logit import query_index
from probes.lens.transformer_bridge import check_bridge, hook_name, run_with_cache

Head = tuple[int, int]
"""Layer and head."""
MEASURES = ("logit", "v_s")
PATTERN_ROLES = ("text", "image", "audio", "header", "template")
"""User's text, picture, clip; the assistant's header; system prompt and control tokens."""
_PATTERN_ROLE = {"other": "template"}
_ROLE_COUNT = len(ROLES) + 1
"""Roles whose means are kept apart: those of `ROLES`, and the gate's position."""
_Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class HeadEffects:
    """The gate's readings with each head's output replaced by its mean over the prompts."""

    intact: pd.DataFrame
    """One row a query: its index columns, `logit` (the language model's own unsafe minus safe logit at the gate's
    position) and `v_s`, with all heads."""
    logit: np.ndarray
    """float32 [layer, head, query]: `logit` without that head."""
    v_s: np.ndarray
    """float32 [layer, head, query]: `v_s` without that head."""

    def support(self, measure: str) -> np.ndarray:
        """Change that each head makes towards each query's own label [layer, head, query].

        Intact minus ablated for harmful queries, ablated minus intact for benign ones; `measure` is one of `MEASURES`.
        """
        sign = np.where(self.intact["label"] == "harmful", 1.0, -1.0)
        return sign * (self.intact[measure].to_numpy() - getattr(self, measure))

    def table(self) -> pd.DataFrame:
        """One row a head and query: the index columns, `layer, head` and `logit, v_s` with each one's `support_…`."""
        layers, heads, _ = self.logit.shape
        support = {measure: self.support(measure) for measure in MEASURES}
        tables = []
        for layer, head in np.ndindex(layers, heads):
            values = {measure: getattr(self, measure)[layer, head] for measure in MEASURES}
            values |= {f"support_{measure}": support[measure][layer, head] for measure in MEASURES}
            tables.append(self.intact.drop(columns=list(MEASURES)).assign(layer=layer, head=head, **values))
        return pd.concat(tables, ignore_index=True)


def summarise_heads(table: pd.DataFrame, measure: str, seed: int = 0) -> pd.DataFrame:
    """Mean support of every head with its cluster-bootstrap interval and test, by topic.

    Args:
        table: of `HeadEffects.table`, or some of its rows.
        measure: "logit" or "v_s".
        seed: of the bootstrap and the permutations.

    Returns:
        Columns `layer, head, measure, n, mean, low, high, p, p_holm`; p of a two-sided permutation test that swaps
        intact and ablated for all queries of a topic together, Holm-adjusted over the heads.
    """
    if measure not in MEASURES:
        raise InputError(f"no measure {measure!r}; use {' or '.join(MEASURES)}")
    rows: list[dict[str, Any]] = []
    resamples = max(1999, 100 * len(table[["layer", "head"]].drop_duplicates()))  # Holm needs finer p values then
    for (layer, head), group in table.groupby(["layer", "head"]):
        values, topics = group[f"support_{measure}"].to_numpy(), group["topic"].tolist()
        mean, low, high = mean_interval(values, topics, seed)
        p = permutation_test(values, np.zeros_like(values), topics, seed, resamples)
        rows.append(
            {"layer": layer, "head": head, "measure": measure, "n": len(group), "mean": mean, "low": low, "high": high}
            | {"p": p}
        )
    summary = pd.DataFrame(rows)
    return summary.assign(p_holm=holm(summary["p"].tolist()))


def ablate_heads(
    model: TransformerBridge,
    casa: Casa,
    queries: Sequence[Query],
    heads: Sequence[Head] | None = None,
    batch_size: int = 32,
) -> HeadEffects:
    """The gate's readings with each head's output z replaced by its mean, one head at a time (mean ablation).

    A position gets the mean over the positions of its role (`probes.gate.positions.ROLES`; the gate's own position is a
    role by itself) in the queries of its surface (`meta["surface"]`): with one mean over all positions, what a head
    writes in a picture would be put into words, and be taken for an effect of its absence. Both classes should be alike
    in number on every surface.

    Args:
        model: `bridge(casa.omni)`, made with the gate attached.
        casa: the gate.
        queries: any mixture of text, image and audio; a prefill is left out.
        heads: default all; the others are left NaN in the result.
        batch_size: queries in one forward.

    Raises:
        InputError: no queries, a head that the model does not have, or a bridge of another model.
    """
    omni = casa.omni
    check_bridge(model, omni)
    layers, per_layer = model.cfg.n_layers, model.cfg.n_heads
    targets = list(heads) if heads is not None else list(np.ndindex(layers, per_layer))
    wrong = [head for head in targets if not (0 <= head[0] < layers and 0 <= head[1] < per_layer)]
    if wrong or not queries:
        raise InputError(f"no head {wrong[0]} in {layers} x {per_layer}" if wrong else "ablation needs queries")
    groups = list(omni.batches(queries, batch_size))
    batches = [omni.encode([queries[index] for index in group], prefill=False) for group in groups]
    surfaces = list(dict.fromkeys(query.meta.get("surface", "") for query in queries))
    places = [
        _places(batch, [surfaces.index(queries[index].meta.get("surface", "")) for index in group])
        for group, batch in zip(groups, batches, strict=True)
    ]
    means = _mean_heads(model, batches, places, len(surfaces) * _ROLE_COUNT)
    intact = np.empty((2, len(queries)), np.float32)
    ablated = np.full((2, layers, per_layer, len(queries)), np.nan, np.float32)
    for group, batch, place in zip(groups, batches, places, strict=True):
        intact[:, group] = _measures(read_gate(model, casa, batch))
        for layer, head in targets:
            hook = partial(_replace, head=head, values=means[layer, head, place])
            ablated[:, layer, head, group] = _measures(read_gate(model, casa, batch, [(hook_name(f"z.{layer}"), hook)]))
    index = query_index(queries).assign(**dict(zip(MEASURES, intact, strict=True)))
    return HeadEffects(index, *ablated)


def read_gate(model: TransformerBridge, casa: Casa, batch: OmniBatch, hooks: Sequence[_Hook] = ()) -> GateReading:
    """The gate's reading of a forward of the bridge with `hooks` (TransformerLens's `fwd_hooks`) in it.

    Raises:
        InputError: a prompt without a position that the gate may read.
    """
    captured: dict[str, Tensor] = {}
    rows = torch.arange(batch.size, device=batch.gate_position.device)

    def keep(value: Tensor, hook: Any) -> None:
        captured["states"] = value

    def cut(value: Tensor, hook: Any) -> Tensor:
        captured["final"] = value[rows, batch.gate_position]
        return captured["final"].unsqueeze(1)  # the head need not score the other positions

    inputs = dict(batch.inputs)
    reading = [*hooks, (hook_name(casa.safety_gate.layer), keep), ("unembed.hook_in", cut)]
    with torch.no_grad():
        logits = model.run_with_hooks(inputs.pop("input_ids"), fwd_hooks=reading, use_cache=False, **inputs)
        logits = precise_pair(casa.omni, casa.safety_gate, logits[:, 0], captured["final"])
        return casa.safety_gate(captured["states"], casa.safety_gate.mask(batch), logits)[1]


def _measures(reading: GateReading) -> np.ndarray:
    """`MEASURES` of a reading [2, batch]."""
    difference = reading.raw_pair[:, 1] - reading.raw_pair[:, 0]
    return torch.stack([difference.float(), reading.v_s.float()]).cpu().numpy()


def _replace(heads: Tensor, hook: Any, head: int, values: Tensor) -> Tensor:
    """`heads` [batch, position, head, d_head] with one head's output set to `values` [batch, position, d_head]."""
    heads = heads.clone()
    heads[:, :, head] = values
    return heads


def _places(batch: OmniBatch, surfaces: Sequence[int]) -> LongTensor:
    """Number of each position's surface and role, long [batch, position]; `surfaces` [batch] are numbers."""
    roles = position_roles(batch)
    roles[torch.arange(batch.size, device=roles.device), batch.gate_position] = len(ROLES)
    return roles + _ROLE_COUNT * torch.tensor(surfaces, device=roles.device).unsqueeze(1)


def _mean_heads(
    model: TransformerBridge, batches: Sequence[OmniBatch], places: Sequence[LongTensor], count: int
) -> Tensor:
    """Mean z [layer, head, place, d_head] over the positions of each of `count` places (`_places`)."""
    layers, shape = model.cfg.n_layers, (model.cfg.n_heads, model.cfg.d_head)
    names = [hook_name(f"z.{layer}") for layer in range(layers)]
    sums: Tensor | None = None
    sizes = torch.zeros(count)
    for batch, place in zip(batches, places, strict=True):
        _, cache = run_with_cache(model, batch, names)
        flat = torch.stack([cache[name].float().flatten(0, 1) for name in names])  # [layer, row, head, d_head]
        if sums is None:
            sums = flat.new_zeros(layers, count, *shape)
            sizes = sizes.to(flat.device)
        sums.index_add_(1, place.flatten(), flat)
        sizes += torch.bincount(place.flatten(), minlength=count)
    assert sums is not None
    means = sums / sizes.clamp(min=1)[None, :, None, None]
    return means.transpose(1, 2).to(model.cfg.dtype)


@dataclass(frozen=True)
class HeadPattern:
    """One head's attention from the gate's position over one prompt; `position` counts no padding."""

    query_id: str
    label: str
    layer: int
    head: int
    tokens: tuple[str, ...]
    """[position]."""
    roles: tuple[str, ...]
    """[position], of `PATTERN_ROLES`."""
    weight: np.ndarray
    """[position]; the weights sum to 1."""

    def shares(self) -> dict[str, float]:
        """Weight on each role that the prompt has."""
        roles = np.array(self.roles)
        return {role: float(self.weight[roles == role].sum()) for role in PATTERN_ROLES if role in self.roles}


def attention_patterns(
    model: TransformerBridge, omni: Omni, queries: Sequence[Query], heads: Sequence[Head], batch_size: int = 32
) -> list[HeadPattern]:
    """Attention of `heads` from the gate's position over the prompt, for every query, in their order.

    Raises:
        InputError: a head that the model does not have, or a bridge of another model.
    """
    check_bridge(model, omni)
    wrong = [head for head in heads if not (0 <= head[0] < model.cfg.n_layers and 0 <= head[1] < model.cfg.n_heads)]
    if wrong:
        raise InputError(f"no head {wrong[0]} in {model.cfg.n_layers} x {model.cfg.n_heads}")
    hooks = {layer: f"blocks.{layer}.attn.hook_pattern" for layer, _ in heads}
    patterns: dict[int, list[HeadPattern]] = {}
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[index] for index in group], prefill=False)
        _, cache = run_with_cache(model, batch, list(hooks.values()))
        roles = position_roles(batch)
        for row, index in enumerate(group):
            mask = batch.inputs["attention_mask"][row].bool()
            tokens = omni.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][row][mask].tolist())
            names = tuple(_PATTERN_ROLE.get(ROLES[role], ROLES[role]) for role in roles[row][mask].tolist())
            gate = int(batch.gate_position[row])
            patterns[index] = [
                HeadPattern(
                    queries[index].id, queries[index].label or "", layer, head, tuple(tokens), names,
                    cache[hooks[layer]][row, head, gate][mask].float().cpu().numpy(),
                )
                for layer, head in heads
            ]  # fmt: skip
    return [pattern for index in range(len(queries)) for pattern in patterns[index]]
