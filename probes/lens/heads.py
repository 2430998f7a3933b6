"""Attention heads through TransformerLens: what the gate loses without each, and what the heads that matter look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.hypothesis import holm, permutation_test
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.gate import GateReading
from probes.lens.logit import check_bridge, hook_name, query_index, run_with_cache

Head = tuple[int, int]
"""Layer and head."""
MEASURES = ("logit", "v_s")
ROLES = ("text", "image", "audio", "header", "template")
"""User's text, picture, clip; the assistant's header; system prompt and control tokens."""
_Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class HeadEffects:
    """What the gate reads with each head's output replaced by its mean over the prompts.

    intact: one row a query: the index columns of `query_index`, `logit` (the language model's own unsafe minus safe
    logit at the gate's position) and `v_s`. logit, v_s: float32 [layer, head, query], the same without that head.
    """

    intact: pd.DataFrame
    logit: np.ndarray
    v_s: np.ndarray

    def support(self, measure: str) -> np.ndarray:
        """How far each head moves each query to its own side [layer, head, query]: intact minus ablated, and the
        negative of that for benign queries, which belong low."""
        sign = np.where(self.intact["label"] == "harmful", 1.0, -1.0)
        return sign * (self.intact[measure].to_numpy() - getattr(self, measure))

    def table(self) -> pd.DataFrame:
        """One row a head and query: the index columns, `layer, head` and `logit, v_s` with each one's `support_…`."""
        layers, heads, _ = self.logit.shape
        support = {measure: self.support(measure) for measure in MEASURES}
        parts = []
        for layer, head in np.ndindex(layers, heads):
            values = {measure: getattr(self, measure)[layer, head] for measure in MEASURES}
            values |= {f"support_{measure}": support[measure][layer, head] for measure in MEASURES}
            parts.append(self.intact.drop(columns=list(MEASURES)).assign(layer=layer, head=head, **values))
        return pd.concat(parts, ignore_index=True)


def summarise_heads(table: pd.DataFrame, measure: str, seed: int = 0) -> pd.DataFrame:
    """Mean support of every head with its cluster-bootstrap interval and test, by topic.

    Args:
        table: of `HeadEffects.table`, or part of it.
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
    for (layer, head), part in table.groupby(["layer", "head"]):
        values, topics = part[f"support_{measure}"].to_numpy(), part["topic"].tolist()
        mean, low, high = mean_interval(values, topics, seed)
        p = permutation_test(values, np.zeros_like(values), topics, seed, resamples)
        rows.append(
            {"layer": layer, "head": head, "measure": measure, "n": len(part), "mean": mean, "low": low, "high": high}
            | {"p": p}
        )
    found = pd.DataFrame(rows)
    return found.assign(p_holm=holm(found["p"].tolist()))


def ablate_heads(
    model: TransformerBridge,
    casa: Casa,
    queries: Sequence[Query],
    heads: Sequence[Head] | None = None,
    batch_size: int = 32,
) -> HeadEffects:
    """Replace each head's output z by its mean, one head at a time, and read the gate again.

    The mean is over all positions of `queries` but padding, so a head without it says what it says on average (mean
    ablation); queries should hold both classes alike.

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
    chosen = list(heads) if heads is not None else list(np.ndindex(layers, per_layer))
    wrong = [head for head in chosen if not (0 <= head[0] < layers and 0 <= head[1] < per_layer)]
    if wrong or not queries:
        raise InputError(f"no head {wrong[0]} in {layers} x {per_layer}" if wrong else "ablation needs queries")
    groups = list(omni.batches(queries, batch_size))
    batches = [omni.encode([queries[index] for index in group], prefill=False) for group in groups]
    means = _mean_heads(model, batches)
    intact = np.empty((2, len(queries)), np.float32)
    ablated = np.full((2, layers, per_layer, len(queries)), np.nan, np.float32)
    for group, batch in zip(groups, batches, strict=True):
        intact[:, group] = _measures(read_gate(model, casa, batch))
        for layer, head in chosen:
            hook = partial(_replace, head=head, mean=means[layer, head])
            ablated[:, layer, head, group] = _measures(read_gate(model, casa, batch, [(hook_name(f"z.{layer}"), hook)]))
    index = query_index(queries).assign(**dict(zip(MEASURES, intact, strict=True)))
    return HeadEffects(index, *ablated)


def read_gate(model: TransformerBridge, casa: Casa, batch: OmniBatch, hooks: Sequence[_Hook] = ()) -> GateReading:
    """What the gate makes of a forward of the bridge with `hooks` (TransformerLens's `fwd_hooks`) in it.

    Raises:
        InputError: a prompt that the gate has nothing to read of.
    """
    kept: dict[str, Tensor] = {}
    rows = torch.arange(batch.size, device=batch.gate_position.device)

    def keep(value: Tensor, hook: Any) -> None:
        kept["states"] = value

    def cut(value: Tensor, hook: Any) -> Tensor:
        return value[rows, batch.gate_position].unsqueeze(1)  # the head need not score the other positions

    inputs = dict(batch.inputs)
    reading = [*hooks, (hook_name(casa.safety_gate.layer), keep), ("unembed.hook_in", cut)]
    with torch.no_grad():
        logits = model.run_with_hooks(inputs.pop("input_ids"), fwd_hooks=reading, use_cache=False, **inputs)
        return casa.safety_gate(kept["states"], casa.safety_gate.mask(batch), logits[:, 0])[1]


def _measures(reading: GateReading) -> np.ndarray:
    """`MEASURES` of a reading [2, batch]."""
    difference = reading.raw_pair[:, 1] - reading.raw_pair[:, 0]
    return torch.stack([difference.float(), reading.v_s.float()]).cpu().numpy()


def _replace(heads: Tensor, hook: Any, head: int, mean: Tensor) -> Tensor:
    """`heads` [batch, position, head, d_head] with one head's output set to `mean` [d_head]."""
    heads = heads.clone()
    heads[:, :, head] = mean
    return heads


def _mean_heads(model: TransformerBridge, batches: Sequence[OmniBatch]) -> Tensor:
    """Mean z [layer, head, d_head] over all positions but padding."""
    names = [hook_name(f"z.{layer}") for layer in range(model.cfg.n_layers)]
    sums, count = [], 0
    for batch in batches:
        mask = batch.inputs["attention_mask"].bool()
        _, cache = run_with_cache(model, batch, names)
        sums.append(torch.stack([cache[name][mask].float().sum(dim=0) for name in names]))
        count += int(mask.sum())
    return (torch.stack(sums).sum(dim=0) / count).to(model.cfg.dtype)


@dataclass(frozen=True)
class HeadPattern:
    """Where one head looks from the gate's position. tokens, roles (of `ROLES`) and weight: one a prompt position,
    padding left out; the weights sum to 1."""

    query_id: str
    label: str
    layer: int
    head: int
    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    weight: np.ndarray

    def shares(self) -> dict[str, float]:
        """The weight on each role that the prompt has."""
        return {role: float(self.weight[np.array(self.roles) == role].sum()) for role in ROLES if role in self.roles}


def attention_patterns(
    model: TransformerBridge, omni: Omni, queries: Sequence[Query], heads: Sequence[Head], batch_size: int = 32
) -> list[HeadPattern]:
    """The attention of `heads` from the gate's position over the prompt, for every query, in their order.

    Raises:
        InputError: a head that the model does not have, or a bridge of another model.
    """
    check_bridge(model, omni)
    wrong = [head for head in heads if not (0 <= head[0] < model.cfg.n_layers and 0 <= head[1] < model.cfg.n_heads)]
    if wrong:
        raise InputError(f"no head {wrong[0]} in {model.cfg.n_layers} x {model.cfg.n_heads}")
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer, _ in heads}
    found: dict[int, list[HeadPattern]] = {}
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[index] for index in group], prefill=False)
        _, cache = run_with_cache(model, batch, list(names.values()))
        roles = _roles(batch)
        for row, index in enumerate(group):
            mask = batch.inputs["attention_mask"][row].bool()
            tokens = omni.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][row][mask].tolist())
            kept = tuple(role for role, real in zip(roles[row], mask.tolist(), strict=True) if real)
            gate = int(batch.gate_position[row])
            found[index] = [
                HeadPattern(
                    queries[index].id, queries[index].label or "", layer, head, tuple(tokens), kept,
                    cache[names[layer]][row, head, gate][mask].float().cpu().numpy(),
                )
                for layer, head in heads
            ]  # fmt: skip
    return [pattern for index in range(len(queries)) for pattern in found[index]]


def _roles(batch: OmniBatch) -> list[list[str]]:
    """For every position of every row one of `ROLES` (padding counts as template)."""
    user = torch.stack(list(batch.modality.values())).any(dim=0)
    masks = {**batch.modality, "header": batch.prompt_mask & ~user}
    roles = [["template"] * user.shape[1] for _ in range(batch.size)]
    for name, mask in masks.items():
        for row, position in mask.nonzero().tolist():
            roles[row][position] = name
    return roles
