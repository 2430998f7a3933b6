"""Replies under a prefill, and the model's states and predictions while it writes them, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from casa_mech.casa import Casa
from casa_mech.casa.attention import UNSAFE
from casa_mech.divergence import kl_divergence
from casa_mech.errors import InputError
from casa_mech.judging.verdict import Judge
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.gate import gated_prompt
from casa_mech.trace.sites import Site
from casa_mech.trace.sweep import Sweep, read_positions
from probes.activations.index import query_record
from probes.prefill.sweep import AttackedModel, PositionAxes, compliance_ids


@dataclass(frozen=True)
class PrefilledReply:
    """A request, the attacker's opening and the model's reply after it."""

    query: Query
    length: int
    """Tokens of the opening."""
    forced: tuple[int, ...]
    """Token ids between header and reply, the gate's token first where there is one."""
    reply: tuple[int, ...]
    """Token ids up to the end of the turn, without it."""
    ended: bool
    """Whether the turn ended within the tokens that were generated."""


def replies_by_length(
    system: AttackedModel,
    queries: Sequence[Query],
    lengths: Sequence[int],
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> list[PrefilledReply]:
    """Greedy replies under a prefill of each length (`gate_first`), query by query in the order of `lengths`.

    As `Casa.generate` and `Omni.generate` reply to the attack `prefill-k` (tested); here with the ids that were forced.

    Raises:
        InputError: a complying answer that is missing or too short.
    """
    omni = system.omni
    tokens = gate_tokens(system.casa, queries, batch_size) if system.casa else [[]] * len(queries)
    answers = compliance_ids(omni, queries, max(lengths))
    jobs = [
        (query, length, [*tokens[number], *answers[number][:length]])
        for number, query in enumerate(queries)
        for length in lengths
    ]
    replies: dict[int, PrefilledReply] = {}
    # Longer prefills go with longer ones, so that little of a batch is padding.
    order = sorted(range(len(jobs)), key=lambda index: (jobs[index][1], index))
    with system.decoding(), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            members = [jobs[index] for index in group]
            batch = omni.encode([query for query, _, _ in members], [ids for _, _, ids in members], prefill=False)
            ids = omni.model.generate(**batch.inputs, max_new_tokens=max_new_tokens, do_sample=False)
            for index, row in zip(group, ids[:, batch.inputs["input_ids"].shape[1] :].tolist(), strict=True):
                query, length, forced = jobs[index]
                reply = omni.until_end(row)
                replies[index] = PrefilledReply(query, length, tuple(forced), tuple(reply), len(reply) < len(row))
    return [replies[index] for index in range(len(jobs))]


def judge_replies(system: AttackedModel, replies: Sequence[PrefilledReply], judge: Judge) -> pd.DataFrame:
    """Verdicts, one row a reply: `system, query_id, label, topic, length, text, outcome`.

    The judge is shown the prefill as the query's. A prefill is worded as `meta["compliance"]`, and a reply may go on in
    the words of `meta["answer"]`, if the query has one: it complies if it does in either.
    """
    rows = []
    for entry in replies:
        prefill = entry.forced[len(entry.forced) - entry.length :]
        query = entry.query.model_copy(update={"prefill": system.omni.decode(prefill)})
        text = system.omni.decode(entry.reply)
        outcome = judge.judge(query, text).outcome
        if outcome != "complied" and query.meta.get("answer", "") not in ("", query.meta["compliance"]):
            answered = query.model_copy(update={"meta": {**query.meta, "compliance": query.meta["answer"]}})
            outcome = "complied" if judge.judge(answered, text).outcome == "complied" else outcome
        rows.append({**_columns(system, entry), "text": text, "outcome": outcome})
    return pd.DataFrame(rows)


def trajectories(
    system: AttackedModel,
    replies: Sequence[PrefilledReply],
    tokens: int,
    openings: Sequence[int],
    axes: Mapping[Site, PositionAxes],
    batch_size: int = 32,
) -> pd.DataFrame:
    """States and predictions at each of the first `tokens` tokens of every reply, under each prefill.

    Args:
        system: the model that wrote the replies.
        replies: of `replies_by_length`, with length 0 among the lengths: the unattacked reply to compare with.
        tokens: how many of each reply.
        openings: ids that open a refusal.
        axes: the axes of each position at some sites (`position_axes`), of the longest prefill and `tokens` together.
        batch_size: replies in one forward.

    Returns:
        One row a reply and token: `system, query_id, label, topic, length, token`; `opening` and `projection <site>`
        along the reply itself, missing after its end; and `kl` along one continuation, the unattacked reply: KL in nats
        of the prediction of its token t behind the prefill from that without one, missing after its end.

    Raises:
        InputError: a request without an unattacked reply.
    """
    by_query: dict[str, list[PrefilledReply]] = {}
    for entry in replies:
        by_query.setdefault(entry.query.id, []).append(entry)
    lacking = [name for name, entries in by_query.items() if all(entry.length for entry in entries)]
    if lacking:
        raise InputError(f"query {lacking[0]!r} has no reply without a prefill to compare with: add length 0")
    rows: list[dict[str, Any]] = []
    ids, replies_per_query = list(by_query), len(replies) // len(by_query)
    step = max(1, batch_size // replies_per_query)
    for start in range(0, len(ids), step):
        group = [entry for name in ids[start : start + step] for entry in by_query[name]]
        rows += _trajectories(system, group, tokens, openings, axes)
    return pd.DataFrame(rows)


def _trajectories(
    system: AttackedModel,
    group: Sequence[PrefilledReply],
    tokens: int,
    openings: Sequence[int],
    axes: Mapping[Site, PositionAxes],
) -> list[dict[str, Any]]:
    """The rows of `trajectories` for whole queries, in one forward."""
    plain = {entry.query.id: number for number, entry in enumerate(group) if entry.length == 0}
    unattacked = [plain[entry.query.id] for entry in group]
    own = _along(system, group, [entry.reply for entry in group], tokens, list(axes))
    log_p = torch.log_softmax(own.logits.float(), dim=-1)
    opening = log_p[..., list(openings)].exp().sum(dim=-1)
    same = _along(system, group, [group[number].reply for number in unattacked], tokens, [])
    log_p = torch.log_softmax(same.logits.float(), dim=-1)
    kl = kl_divergence(log_p, log_p[unattacked])
    at = np.array([entry.length for entry in group])[:, None] + np.arange(tokens)[None]
    projected = {site: axis.project(own.states[site].float().cpu().numpy(), at) for site, axis in axes.items()}
    rows = []
    for number, entry in enumerate(group):
        written, compared = _predicted(entry, tokens), _predicted(group[unattacked[number]], tokens)
        for token in range(max(written, compared)):
            values = {"opening": opening, **{f"projection {site}": values for site, values in projected.items()}}
            row = {name: float(values[name][number, token]) if token < written else np.nan for name in values}
            row["kl"] = float(kl[number, token]) if token < compared else np.nan
            rows.append({**_columns(system, entry), "token": token, **row})
    return rows


def _along(
    system: AttackedModel,
    group: Sequence[PrefilledReply],
    replies: Sequence[Sequence[int]],
    tokens: int,
    sites: Sequence[Site],
) -> Sweep:
    """States and predictions of the first `tokens` tokens of `replies`, each behind its entry's prefill."""
    omni = system.omni
    # The last token that is predicted need not be read itself; every row gets as many, so that positions line up.
    targets = [[*entry.forced, *_padded(omni, ids, tokens - 1)] for entry, ids in zip(group, replies, strict=True)]
    batch = omni.encode([entry.query for entry in group], targets, prefill=False)
    start = batch.gate_position + torch.tensor([len(entry.forced) for entry in group], device=omni.device)
    positions = start[:, None] + torch.arange(tokens, device=omni.device)[None]
    return read_positions(omni, batch, positions, sites)


def _padded(omni: Omni, reply: Sequence[int], tokens: int) -> list[int]:
    return [*reply[:tokens], *[omni.end_id] * (tokens - len(reply))]


def _predicted(entry: PrefilledReply, tokens: int) -> int:
    """Number of tokens that were predicted, the end of the turn included, up to `tokens`."""
    return min(tokens, len(entry.reply) + int(entry.ended))


def gate_tokens(casa: Casa, queries: Sequence[Query], batch_size: int = 64) -> list[list[int]]:
    """Id of the token that the gate chooses before any prefill, a list of one for each query."""
    tokens: dict[int, list[int]] = {}
    for group in casa.omni.batches(queries, batch_size):
        batch = casa.omni.encode([queries[index] for index in group], prefill=False)
        pair: Tensor = gated_prompt(casa.omni, batch, casa.safety_gate, batch.gate_position, False).reading.pair
        decisions = (pair.argmax(dim=-1) == UNSAFE).tolist()
        tokens |= {index: [casa.token_ids[int(unsafe)]] for index, unsafe in zip(group, decisions, strict=True)}
    return [tokens[index] for index in range(len(queries))]


def _columns(system: AttackedModel, entry: PrefilledReply) -> dict[str, Any]:
    return {"system": system.name, **query_record(entry.query), "length": entry.length}
