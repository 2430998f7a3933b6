"""Minimal sets: the few positions of a prompt without which the gate decides otherwise."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import BoolTensor, Tensor

from casa_mech.casa import Casa
from casa_mech.casa.attention import SAFE, UNSAFE
from casa_mech.errors import InputError
from casa_mech.judging.stats import cluster_of
from casa_mech.omni import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.gate import precise_pair
from casa_mech.trace.patch import edited_prompt
from casa_mech.vocabulary import chunks
from probes.gate.positions import KEY, ROLES, key_positions, position_roles
from probes.gate.safety_attention import gate_inputs, whole_states

Removal = Literal["model", "gate"]
SCORES, PERMUTED = "greedy", "greedy on permuted scores"
"""A search by what each removal does to the decision, and one in which these scores are dealt to other positions."""


@dataclass(frozen=True)
class MinimalSet:
    """Positions of one prompt without which the gate decides otherwise."""

    query_id: str
    label: str
    topic: str
    decision: str
    """"safe" or "unsafe", before any removal."""
    flipped: bool
    """Whether the search ended with the other decision."""
    positions: tuple[int, ...]
    """Positions removed, in that order."""
    tokens: tuple[str, ...]
    """The tokens there."""
    roles: tuple[str, ...]
    """Their roles: names of `ROLES` or the key word."""
    readable: int
    """Number of positions that safety attention reads."""
    v_s: tuple[float, ...]
    """Before, and after each removal."""
    permuted: tuple[tuple[int, bool], ...]
    """Of each search on permuted scores: how many positions it removed, and whether that flipped the decision."""


@dataclass(frozen=True)
class _Prompt:
    """One prompt, and what the gate and the model read of it."""

    casa: Casa
    batch: OmniBatch
    """The prompt alone."""
    readable: BoolTensor
    """[position]: safety attention may read it."""
    removable: BoolTensor
    """[position]: it may be removed."""
    states: Tensor | None
    """[position, d_model]: the gate's input; None where the model runs anew for every removal."""
    logits: Tensor | None
    """[vocab]: the language model's own; None likewise."""
    embeddings: Tensor
    """[1, position, d_model]: the model's input."""

    def read(self, removed: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """v_s [set] and the rewritten pair's difference, unsafe minus safe [set], without each set of `removed`.

        So many sets at a time that neither the prompts' states nor their logits are more than a chunk.
        """
        omni = self.casa.omni
        width = max(len(self.readable) * omni.d_model, omni.vocab_size)
        parts = [self._read(removed[rows]) for rows in chunks(len(removed), width)]
        v_s, margins = zip(*parts, strict=True)
        return torch.cat(v_s), torch.cat(margins)

    def _read(self, removed: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        count = len(removed)
        hidden = torch.zeros(count, len(self.readable), dtype=torch.bool, device=self.readable.device)
        for row, positions in enumerate(removed):
            hidden[row, list(positions)] = True
        if self.states is None or self.logits is None:
            batch = _repeated(self.batch, count, self.casa.omni.architecture.features)
            gate = self.casa.safety_gate
            embeddings = self.embeddings.expand(count, -1, -1)
            reading = edited_prompt(
                self.casa.omni, batch, batch.gate_position, {}, gate, hidden=hidden, embeddings=embeddings
            ).reading
            assert reading is not None
        else:
            with torch.no_grad():
                states, logits = self.states.expand(count, -1, -1), self.logits.expand(count, -1)
                _, reading = self.casa.safety_gate(states, self.readable & ~hidden, logits)
        return reading.v_s, reading.pair[:, UNSAFE] - reading.pair[:, SAFE]


def minimal_sets(
    casa: Casa,
    queries: Sequence[Query],
    removed_from: Removal = "model",
    largest: int = 12,
    draws: int = 8,
    seed: int = 0,
) -> list[MinimalSet]:
    """For each query a small set of positions that the gate must not lose, in the order of the queries.

    Greedily the position whose removal moves the decision most, then the next, until the other token wins. A set is
    minimal step by step, not proven the smallest. A prefill is left out.

    Args:
        casa: the trained gate.
        queries: prompts.
        removed_from: `"model"`: no other position attends to the removed ones and the gate does not read them (the
            header's last token, from which the decision is predicted, always stays); `"gate"`: only the gate does not
            read them, while the model's states and its own two logits stay.
        largest: the number of removals after which the search gives up.
        draws: searches of the same kind with the scores of the positions permuted at every step, to compare with.
        seed: of the permutations.

    Raises:
        InputError: a gate without safety attention.
    """
    _ = casa.attention  # a neutral gate reads nothing that could be removed
    rng = np.random.default_rng(seed)
    sets = []
    for query in queries:
        prompt = _prompt(casa, query, removed_from)
        removed, v_s, margins = _greedy(prompt, largest)
        tokens, roles = _named(casa, prompt.batch, query, removed)
        sets.append(
            MinimalSet(
                query_id=query.id,
                label=query.label or "",
                topic=str(cluster_of(query)),
                decision="unsafe" if margins[0] > 0 else "safe",
                flipped=margins[-1] * margins[0] < 0,
                positions=tuple(removed),
                tokens=tokens,
                roles=roles,
                readable=int(prompt.readable.sum()),
                v_s=tuple(v_s),
                permuted=tuple(_permuted(prompt, largest, draws, rng, margins[0])),
            )
        )
    return sets


def sets_table(sets: Sequence[MinimalSet]) -> pd.DataFrame:
    """One row a search: `query_id, label, topic, decision, readable, v_s, search, flipped, size, first, v_s_after`.

    `search` is `SCORES` (one row a query) or `PERMUTED`; `size`: the positions removed when it ended. Of the former
    also `first`, the role of the position that was removed first, and `v_s_after`, v_s when all were.

    Raises:
        InputError: no sets.
    """
    if not sets:
        raise InputError("there are no minimal sets: give at least one query")
    rows: list[dict[str, Any]] = []
    for minimal in sets:
        names = ("query_id", "label", "topic", "decision", "readable")
        shared = {**{name: getattr(minimal, name) for name in names}, "v_s": minimal.v_s[0]}
        first = minimal.roles[0].replace("text", "other text") if minimal.roles else ""
        searched = {"search": SCORES, "flipped": minimal.flipped, "size": len(minimal.positions)}
        rows.append({**shared, **searched, "first": first, "v_s_after": minimal.v_s[-1]})
        rows += [
            {**shared, "search": PERMUTED, "flipped": flipped, "size": size, "first": "", "v_s_after": np.nan}
            for size, flipped in minimal.permuted
        ]
    return pd.DataFrame(rows)


def _prompt(casa: Casa, query: Query, removed_from: Removal) -> _Prompt:
    batch, sweep, mask = gate_inputs(casa, [query])
    embeddings = capture(casa.omni, batch, ["embeddings"], "all")["embeddings"]
    if removed_from == "gate":
        logits = precise_pair(casa.omni, casa.safety_gate, sweep.logits[:, 0], sweep.final[:, 0])[0]
        return _Prompt(casa, batch, mask[0], mask[0], whole_states(sweep)[0], logits, embeddings)
    removable = mask[0].clone()
    removable[batch.gate_position[0]] = False
    return _Prompt(casa, batch, mask[0], removable, None, None, embeddings)


def _repeated(batch: OmniBatch, count: int, features: Collection[str]) -> OmniBatch:
    """A batch of one query `count` times, without the encoders' `features`; grids are stacked along the first axis."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.repeat(count, *[1] * (tensor.dim() - 1))

    return OmniBatch(
        inputs={name: repeat(value) for name, value in batch.inputs.items() if name not in features},
        prompt_mask=repeat(batch.prompt_mask),
        modality={name: repeat(mask) for name, mask in batch.modality.items()},
        gate_position=repeat(batch.gate_position),
        last_position=repeat(batch.last_position),
    )


def _greedy(prompt: _Prompt, largest: int) -> tuple[list[int], list[float], list[float]]:
    """Positions removed, in order; v_s and margins (unsafe minus safe) before and after each removal."""
    remaining = prompt.removable.nonzero()[:, 0].tolist()
    removed: list[int] = []
    v_s, margins = (value.tolist() for value in prompt.read([[]]))
    sign = 1.0 if margins[0] > 0 else -1.0
    while margins[-1] * sign > 0 and len(removed) < _most(prompt, largest):
        v_s_without, margins_without = prompt.read([[*removed, position] for position in remaining])
        best = int((margins_without * sign).argmin())
        removed.append(remaining.pop(best))
        v_s.append(float(v_s_without[best]))
        margins.append(float(margins_without[best]))
    return removed, v_s, margins


def _permuted(
    prompt: _Prompt, largest: int, draws: int, rng: np.random.Generator, margin: float
) -> list[tuple[int, bool]]:
    """Size and success of `draws` searches with permuted scores; `margin` is the decision's before any removal.

    With its score dealt anew at every step each position is as likely as any other to be the next, so a search is a
    random order, which ends where the decision flips. The scores themselves need not be computed.
    """
    most, positions = _most(prompt, largest), prompt.removable.nonzero()[:, 0].cpu().numpy()
    orders = [rng.permutation(positions)[:most].tolist() for _ in range(draws)]
    if not most or not orders:
        return [(0, False)] * draws
    prefixes = [order[: size + 1] for order in orders for size in range(most)]
    flips = (prompt.read(prefixes)[1] * margin < 0).reshape(draws, most).cpu().numpy()
    return [(int(row.argmax()) + 1, True) if row.any() else (most, False) for row in flips]


def _most(prompt: _Prompt, largest: int) -> int:
    """The most positions that a search removes: the gate must keep something to read."""
    return min(largest, int(prompt.readable.sum()) - 1, int(prompt.removable.sum()))


def _named(
    casa: Casa, batch: OmniBatch, query: Query, removed: Sequence[int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The removed positions' tokens and roles. The batch is of one query, so that it has no padding."""
    roles, ids = position_roles(batch)[0], batch.inputs["input_ids"][0]
    key = key_positions(casa.omni, batch, [query])[0]
    tokens = tuple(casa.omni.tokenizer.decode([int(ids[position])]).strip() for position in removed)
    return tokens, tuple(KEY if key[position] else ROLES[int(roles[position])] for position in removed)
