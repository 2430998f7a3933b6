"""The attackers' losses, with their gradient: through the gate (aware of it) or through the base model alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import LongTensor, Tensor
from torch.nn import functional

from casa_mech.casa import Casa
from casa_mech.casa.open_gate import OpenGate, OpenReading
from casa_mech.errors import InputError
from casa_mech.omni import OmniBatch
from casa_mech.omni.finite import check_decision
from casa_mech.queries import Query
from casa_mech.trace.gate import SafetyGateLike, TokenRows, gated_prompt, gated_targets
from casa_mech.trace.targets import plain_targets
from casa_mech.vocabulary import cross_entropy

Aim = Literal["token", "v_s", "joint", "compliance"]
"""The loss that is minimised. "token": the rewritten logit of the unsafe token minus that of the safe one. "v_s": the
logit of v_s. "joint": minus the log-probability of the safe token, of the two, minus the mean log-probability of the
complying answer's opening after it. "compliance": minus the mean log-probability of the opening in the base model; this
attacker does not know of the gate."""
AWARE: tuple[Aim, ...] = ("token", "v_s", "joint")
"""The aims of an attacker who knows the gate."""


@dataclass(frozen=True)
class Losses:
    """Losses of one forward."""

    value: Tensor
    """The attacker's loss [batch]."""
    margin: Tensor
    """The unsafe token's rewritten logit minus the safe one's [batch]; the gate says "safe" where it is not above 0."""
    slopes: tuple[Tensor, ...] = ()
    """Gradients of the sum of `value` in the tensors `wrt`."""


class Objective:
    """An aim on some queries, encoded once.

    Args:
        casa: the gate on its model.
        queries: any mixture.
        aim: see `Aim`.
        opening_tokens: how many tokens of `meta["compliance"]` are the opening.

    Raises:
        InputError: no queries, one with a prefill, or, if the aim needs it, without a complying answer in its meta.
    """

    def __init__(self, casa: Casa, queries: Sequence[Query], aim: Aim, opening_tokens: int) -> None:
        check_queries(queries, aim)
        self._casa, self._aim, self._queries = casa, aim, list(queries)
        self._gate: SafetyGateLike = OpenGate(casa)
        safe = casa.token_ids[0]
        targets = [[safe] if aim != "compliance" else [] for _ in queries]
        if aim in ("joint", "compliance"):
            for target, query in zip(targets, queries, strict=True):
                target += casa.omni.reply_ids(query.meta["compliance"])[:-1][:opening_tokens]
        self.batch: OmniBatch = casa.omni.encode(queries, targets, prefill=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block in which many losses are computed: with LoRA merged where the loss is of the gate's own model."""
        if self._aim == "compliance":
            yield
        else:
            with self._casa.parts.adapter.merged():
                yield

    def __call__(
        self, batch: OmniBatch, wrt: Sequence[Tensor] = (), added: Tensor | None = None, watch: bool = True
    ) -> Losses:
        """The losses on `batch`: `self.batch`, in which an attacker has exchanged features or words.

        Args:
            batch: the prompts with the opening.
            wrt: the tensors to differentiate by, which the batch's features, or `added`, are computed from.
            added: [batch, position, d_model] added to the word embeddings; zeros, for their gradient.
            watch: read the gate's margin for an aim without the gate, too (NaN otherwise).

        Raises:
            ModelError: a loss that is not finite, by which no attack can be found; it names the query.
        """
        with torch.set_grad_enabled(bool(wrt)):
            if self._aim != "compliance":
                value, margin = self._gated(batch, added)
                check_decision("the attack's loss", value, self._queries)
                return Losses(value.detach(), margin, _slopes(value, wrt))
            with self._casa.disabled():
                targets = plain_targets(self._casa.omni, batch, added)
                value = _mean_loss(targets.logits, targets.tokens, targets.row, batch.size)
                # In here: the token rows are written back at the block's end, into weights that the graph holds.
                slopes = _slopes(value, wrt)
        value = value.detach()
        check_decision("the attack's loss", value, self._queries)
        return Losses(value, self._margin(batch) if watch else torch.full_like(value, torch.nan), slopes)

    def _gated(self, batch: OmniBatch, added: Tensor | None) -> tuple[Tensor, Tensor]:
        omni, rows = self._casa.omni, self._casa.parts.tokens.rows
        gated = gated_targets(omni, batch, self._gate, rows if added is None else _Added(rows, added))
        reading = gated.reading
        assert isinstance(reading, OpenReading)
        if self._aim == "joint":
            is_reply = torch.ones_like(gated.row, dtype=torch.bool).index_fill(0, gated.first, False)
            value = functional.softplus(reading.surrogate) + _mean_loss(
                gated.logits[is_reply], gated.tokens[is_reply], gated.row[is_reply], batch.size
            )
        else:
            value = reading.surrogate if self._aim == "token" else reading.log_odds
        return value, (reading.pair[:, 1] - reading.pair[:, 0]).detach()

    def _margin(self, batch: OmniBatch) -> Tensor:
        prompt = gated_prompt(self._casa.omni, batch, self._casa.safety_gate, batch.gate_position, use_cache=False)
        return prompt.reading.pair[:, 1] - prompt.reading.pair[:, 0]


class _Added:
    """The safety tokens' rows, and a tensor added to all embeddings."""

    def __init__(self, rows: TokenRows, added: Tensor) -> None:
        self._added = added
        self._rows = rows
        self.score = rows.score

    def embed(self, embeddings: Tensor, input_ids: LongTensor) -> Tensor:
        return self._rows.embed(embeddings, input_ids) + self._added


def check_queries(queries: Sequence[Query], aim: Aim) -> None:
    """Refuse queries that no attack can work on.

    Raises:
        InputError: no queries, one with a prefill, or without the complying answer that the aim reads.
    """
    if not queries:
        raise InputError("there are no queries to attack: give at least one")
    for query in queries:
        if query.prefill:
            raise InputError(
                f"query {query.id!r} has a prefill: attack the plain query, and add the prefill afterwards"
            )
        if aim in ("joint", "compliance") and not query.meta.get("compliance", "").strip():
            raise InputError(
                f"query {query.id!r} has no meta['compliance'], whose opening the aim {aim!r} makes likely: add it, or "
                "aim at 'token' or 'v_s'"
            )


def _slopes(value: Tensor, wrt: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), list(wrt)) if wrt else ()


def _mean_loss(logits: Tensor, tokens: LongTensor, row: LongTensor, size: int) -> Tensor:
    """Mean over each query's tokens of minus their log-probability [batch]."""
    losses = cross_entropy(logits, tokens)
    total = losses.new_zeros(size).index_add(0, row, losses)
    return total / losses.new_zeros(size).index_add(0, row, torch.ones_like(losses))
