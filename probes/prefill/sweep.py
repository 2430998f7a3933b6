"""Sweeps over prefills: states, predictions and the gate after each length of an attacker's opening.

A prefill of k tokens is the first k of a complying answer. Attention is causal, so the states after each of them, at
every depth, come from one forward over the longest. Prefills and measures after "Safety alignment
should be made more than just a few tokens deep" (arXiv 2406.05946); the two orders are those of docs/method.md §1.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import LongTensor, Tensor

from casa_mech.casa import Casa
from casa_mech.casa.adapter import Adapter
from casa_mech.casa.attention import SAFE, UNSAFE
from casa_mech.divergence import kl_divergence
from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.gate import GateReading, precise_pair
from casa_mech.trace.sites import Site
from casa_mech.trace.sweep import read_positions
from probes.activations.index import query_record


@dataclass(frozen=True)
class AttackedModel:
    """A model under prefill attacks, with or without a gate."""

    name: str
    """In tables, column `system`."""
    omni: Omni
    casa: Casa | None = None
    """Its gate, which decides before the prefill (`gate_first`) and whose token then stands before it."""
    adapter: Adapter | None = None
    """A LoRA that may be merged for decoding; a gate's own need not be given."""

    def decoding(self) -> AbstractContextManager[None]:
        """Merge the LoRA into the weights while a block runs that only generates."""
        adapter = self.casa.parts.adapter if self.casa else self.adapter
        return adapter.merged() if adapter else nullcontext()


@dataclass(frozen=True)
class PositionAxes:
    """At one site, for each position of a reply the line from the benign to the harmful requests' mean state there.

    A position's own tokens move its states far more than the label does, so one line for all positions would measure
    how far the reply has come.
    """

    midpoints: np.ndarray
    """[position, d_model]: half way between the two means; position 0 is the header's or safety token's."""
    directions: np.ndarray
    """[position, d_model]: the harmful mean minus the benign one, of length 1."""
    spreads: np.ndarray
    """[position]: standard deviation along it within a label, of the requests that it was fitted on."""

    @classmethod
    def fit(cls, harmful: np.ndarray, benign: np.ndarray) -> PositionAxes:
        """The axes from states [query, position, d_model] of either label."""
        means = harmful.mean(axis=0), benign.mean(axis=0)
        lengths = np.linalg.norm(means[0] - means[1], axis=-1, keepdims=True)
        directions = (means[0] - means[1]) / np.maximum(lengths, np.finfo(np.float32).tiny)
        residuals = [
            ((states - mean) * directions).sum(axis=-1) for states, mean in zip((harmful, benign), means, strict=True)
        ]
        return cls((means[0] + means[1]) / 2, directions, np.concatenate(residuals).std(axis=0))

    def project(self, states: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Coordinates [...] of `states` [..., d_model] at `positions` [...], in standard deviations within a label.

        0 is half way between the labels, above it the harmful side.
        """
        along = ((states - self.midpoints[positions]) * self.directions[positions]).sum(axis=-1)
        coordinates: np.ndarray = along / np.maximum(self.spreads[positions], np.finfo(np.float32).tiny)
        return coordinates


@dataclass(frozen=True)
class PrefillSweep:
    """One model under prefills of every length; the axis `step` is the lengths in order."""

    system: str
    """The model's name."""
    lengths: tuple[int, ...]
    """Tokens of the attacker's opening."""
    states: dict[Site, np.ndarray]
    """For each site float32 [query, step, d_model], at the last token of the prefill."""
    opening: np.ndarray
    """[query, step]: probability that the next token opens a refusal."""
    kl: np.ndarray
    """[query, step]: KL in nats of the next token's distribution from the one without a prefill."""
    index: pd.DataFrame
    """One row a query, `query_id, label, topic`."""
    unsafe_first: np.ndarray | None = None
    """bool [query]: the gate's decision before any prefill (`gate_first`); None without a gate."""
    v_s: np.ndarray | None = None
    """[query, step]: v_s where the gate decides after the prefill (`prefill_first`); None without a gate."""
    logit: np.ndarray | None = None
    """[query, step]: the difference of the rewritten pair there, unsafe minus safe; None without a gate."""

    def table(self, axes: Mapping[Site, PositionAxes] | None = None) -> pd.DataFrame:
        """One row a query and length.

        Returns:
            Columns `system, query_id, label, topic, length, opening, kl`, `projection <site>` for each of `axes`, and
            with a gate `unsafe_a` (it decides first), `unsafe_b` (the prefill comes first), `v_s` and `logit`.
        """
        steps = len(self.lengths)
        table = self.index.loc[self.index.index.repeat(steps)].reset_index(drop=True)
        table.insert(0, "system", self.system)
        table["length"] = np.tile(self.lengths, len(self.index))
        columns = {"opening": self.opening, "kl": self.kl}
        columns |= {
            f"projection {site}": axis.project(self.states[site], np.array(self.lengths))
            for site, axis in (axes or {}).items()
        }
        if self.v_s is not None and self.logit is not None and self.unsafe_first is not None:
            columns |= {"v_s": self.v_s, "logit": self.logit, "unsafe_b": self.logit > 0}
            columns["unsafe_a"] = np.repeat(self.unsafe_first[:, None], steps, axis=1)
        return table.assign(**{name: values.reshape(-1) for name, values in columns.items()})


def compliance_ids(omni: Omni, queries: Sequence[Query], tokens: int) -> list[list[int]]:
    """The first `tokens` ids of each query's `meta["compliance"]`.

    Raises:
        InputError: a query without such an answer, or with a shorter one.
    """
    openings = []
    for query in queries:
        text = query.meta.get("compliance", "").strip()
        ids = omni.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if len(ids) < tokens:
            raise InputError(
                f"query {query.id!r}: a prefill of {tokens} tokens needs a complying answer of as many in "
                f"meta['compliance'], which has {len(ids)}"
            )
        openings.append(list(ids[:tokens]))
    return openings


def prefill_sweep(
    system: AttackedModel,
    queries: Sequence[Query],
    lengths: Sequence[int],
    openings: Sequence[int],
    sites: Sequence[Site] | None = None,
    batch_size: int = 32,
) -> PrefillSweep:
    """States and predictions of `system` after each length of prefill, from one forward over the longest.

    A gated model takes a second one: without its token, for the decisions after a prefill; that one comes first.

    Args:
        system: the model.
        queries: requests with `meta["compliance"]`; a prefill of their own is left out.
        lengths: numbers of tokens, 0 among them or not.
        openings: ids that open a refusal (`probes.linear.refusal_direction.opening_ids`).
        sites: default the embeddings, every block's output and the final norm's.
        batch_size: queries in one forward.

    Raises:
        InputError: no length or a negative one, or a complying answer that is missing or too short.
    """
    if not lengths or min(lengths) < 0:
        raise InputError(f"lengths of prefills must be 0 or more, not {list(lengths)}")
    omni = system.omni
    wanted: list[Site] = list(sites) if sites is not None else ["embeddings", *range(omni.n_layers), "norm"]
    arrays: dict[str, np.ndarray] = {}
    for group in omni.batches(queries, batch_size):
        for name, values in _sweep(system, [queries[index] for index in group], lengths, openings, wanted).items():
            arrays.setdefault(name, np.empty((len(queries), *values.shape[1:]), values.dtype))[group] = values
    index = pd.DataFrame([query_record(query) for query in queries])
    states = {site: arrays.pop(f"states {site}") for site in wanted}
    return PrefillSweep(system.name, tuple(lengths), states, index=index, **arrays)


def position_axes(
    system: AttackedModel,
    harmful: Sequence[Query],
    benign: Sequence[Query],
    sites: Sequence[Site],
    positions: int,
    batch_size: int = 32,
) -> dict[Site, PositionAxes]:
    """The axes of `system` at each site, for a reply's positions from 0 to `positions - 1`, along complying answers.

    Use other requests than are measured, the two labels in the same wordings.

    Raises:
        InputError: a complying answer that is missing or too short.
    """
    states = [
        prefill_sweep(system, queries, range(positions), [0], sites, batch_size).states for queries in (harmful, benign)
    ]
    return {site: PositionAxes.fit(states[0][site], states[1][site]) for site in sites}


def _sweep(
    system: AttackedModel, queries: list[Query], lengths: Sequence[int], openings: Sequence[int], sites: Sequence[Site]
) -> dict[str, np.ndarray]:
    """Arrays [query, ...] of one batch, by the names of `PrefillSweep`."""
    omni = system.omni
    forced = compliance_ids(omni, queries, max(lengths))
    arrays: dict[str, np.ndarray] = {}
    if system.casa is not None:
        decisions, tokens = _decisions(system.casa, queries, forced, lengths)
        arrays |= decisions
        forced = [[token, *ids] for token, ids in zip(tokens, forced, strict=True)]
    # The distribution without a prefill is needed to compare with, whether or not 0 is among the lengths.
    steps = [0, *lengths]
    batch = omni.encode(queries, forced, prefill=False)
    sweep = read_positions(omni, batch, _after(batch, steps, int(system.casa is not None)), sites)
    log_p = torch.log_softmax(sweep.logits.float(), dim=-1)
    log_p, plain = log_p[:, 1:], log_p[:, :1]
    arrays |= {f"states {site}": _array(states[:, 1:]) for site, states in sweep.states.items()}
    arrays["opening"] = _array(log_p[..., list(openings)].exp().sum(dim=-1))
    arrays["kl"] = _array(kl_divergence(log_p, plain))
    return arrays


def _decisions(
    casa: Casa, queries: list[Query], forced: list[list[int]], lengths: Sequence[int]
) -> tuple[dict[str, np.ndarray], list[int]]:
    """The gate after each length (`prefill_first`), and the token that it chooses before any (`gate_first`)."""
    gate, omni = casa.safety_gate, casa.omni
    batch = omni.encode(queries, forced, prefill=False)
    sweep = read_positions(omni, batch, _after(batch, [0, *lengths], 0), [], gate.layer)
    assert sweep.whole is not None
    mask = gate.mask(batch)
    readings: list[GateReading] = []
    with torch.no_grad():
        for step in range(sweep.logits.shape[1]):
            logits = precise_pair(omni, gate, sweep.logits[:, step], sweep.final[:, step])
            readings.append(gate(sweep.whole, mask, logits)[1])
    logit = torch.stack([reading.pair[:, UNSAFE] - reading.pair[:, SAFE] for reading in readings], dim=1)
    first = logit[:, 0] > 0
    arrays = {
        "unsafe_first": first.cpu().numpy(),
        "v_s": _array(torch.stack([reading.v_s for reading in readings[1:]], dim=1)),
        "logit": _array(logit[:, 1:]),
    }
    return arrays, [casa.token_ids[int(unsafe)] for unsafe in first.tolist()]


def _after(batch: OmniBatch, lengths: Sequence[int], offset: int) -> LongTensor:
    """Positions [batch, step]: the last of `lengths` tokens after the header and `offset` more."""
    steps = torch.tensor(lengths, device=batch.gate_position.device)
    return batch.gate_position[:, None] + offset + steps[None]


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().cpu().numpy()
    return array
