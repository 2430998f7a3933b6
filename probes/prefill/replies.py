"""What a model says under a prefill, and what goes on in it while it does: by length and by generated token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from casa_mech.casa import Casa
from casa_mech.casa.attention import UNSAFE
from casa_mech.divergence import kl_divergence
from casa_mech.errors import InputError
from casa_mech.judging.stats import cluster_of
from casa_mech.judging.verdict import Judge
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.gate import gated_prompt
from casa_mech.trace.sites import Site
from casa_mech.trace.sweep import read_positions
from probes.prefill.sweep import RefusalAxis, System, compliance_ids


@dataclass(frozen=True)
class Attacked:
    """A request, the attacker's opening and what the model wrote after it. `forced`: ids between header and reply, the
    gate's token first where there is one; `reply`: ids up to, without, the end of the turn; `ended`: whether there was
    one."""

    query: Query
    length: int
    forced: tuple[int, ...]
    reply: tuple[int, ...]
    ended: bool


def replies_by_length(
    system: System, queries: Sequence[Query], lengths: Sequence[int], max_new_tokens: int = 24, batch_size: int = 64
) -> list[Attacked]:
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
    found: dict[int, Attacked] = {}
    # Longer prefills go with longer ones, so that little of a batch is padding.
    order = sorted(range(len(jobs)), key=lambda index: (jobs[index][1], index))
    with system.decoding(), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            chosen = [jobs[index] for index in group]
            batch = omni.encode([query for query, _, _ in chosen], [ids for _, _, ids in chosen], prefill=False)
            ids = omni.model.generate(**batch.inputs, max_new_tokens=max_new_tokens, do_sample=False)
            for index, row in zip(group, ids[:, batch.inputs["input_ids"].shape[1] :].tolist(), strict=True):
                query, length, forced = jobs[index]
                reply = omni.until_end(row)
                found[index] = Attacked(query, length, tuple(forced), tuple(reply), len(reply) < len(row))
    return [found[index] for index in range(len(jobs))]


def judged(system: System, attacked: Sequence[Attacked], judge: Judge) -> pd.DataFrame:
    """Verdicts: one row a reply, `system, query_id, label, topic, length, text, outcome`.

    The judge is shown the prefill as the query's."""
    rows = []
    for entry in attacked:
        prefill = entry.forced[len(entry.forced) - entry.length :]
        query = entry.query.model_copy(update={"prefill": system.omni.decode(prefill)})
        text = system.omni.decode(entry.reply)
        rows.append({**_about(system, entry), "text": text, "outcome": judge.judge(query, text).outcome})
    return pd.DataFrame(rows)


def trajectories(
    system: System,
    attacked: Sequence[Attacked],
    tokens: int,
    openings: Sequence[int],
    axes: Mapping[Site, RefusalAxis],
    batch_size: int = 32,
) -> pd.DataFrame:
    """What the model holds and would say at each of the first `tokens` tokens of its reply, under each prefill.

    Args:
        system: the model that wrote the replies.
        attacked: of `replies_by_length`, with length 0 among the lengths: the unattacked reply to compare with.
        tokens: how many of each reply; those after its end are left out.
        openings: ids that open a refusal. axes: the refusal axis at some sites.

    Returns:
        One row a reply and token: `system, query_id, label, topic, length, token, opening`, `projection <site>`, and
        `kl`: KL in nats of the distribution of token t from that of token t of the unattacked reply, each after its
        own tokens before; missing where the unattacked reply has ended.

    Raises:
        InputError: a request without an unattacked reply.
    """
    by_query: dict[str, list[Attacked]] = {}
    for entry in attacked:
        by_query.setdefault(entry.query.id, []).append(entry)
    lacking = [name for name, entries in by_query.items() if all(entry.length for entry in entries)]
    if lacking:
        raise InputError(f"query {lacking[0]!r} has no reply without a prefill to compare with: add length 0")
    rows: list[dict[str, Any]] = []
    names, each = list(by_query), len(attacked) // len(by_query)
    step = max(1, batch_size // each)
    for start in range(0, len(names), step):
        group = [entry for name in names[start : start + step] for entry in by_query[name]]
        rows += _trajectories(system, group, tokens, openings, axes)
    return pd.DataFrame(rows)


def _trajectories(
    system: System,
    group: Sequence[Attacked],
    tokens: int,
    openings: Sequence[int],
    axes: Mapping[Site, RefusalAxis],
) -> list[dict[str, Any]]:
    omni = system.omni
    # The last token that is predicted need not be read itself; every row gets as many, so that positions line up.
    targets = [[*entry.forced, *_padded(omni, entry.reply, tokens - 1)] for entry in group]
    batch = omni.encode([entry.query for entry in group], targets, prefill=False)
    start = batch.gate_position + torch.tensor([len(entry.forced) for entry in group], device=omni.device)
    positions = start[:, None] + torch.arange(tokens, device=omni.device)[None]
    sweep = read_positions(omni, batch, positions, list(axes))
    log_p = torch.log_softmax(sweep.logits.float(), dim=-1)
    plain = {entry.query.id: number for number, entry in enumerate(group) if entry.length == 0}
    kl = kl_divergence(log_p, log_p[[plain[entry.query.id] for entry in group]])
    opening = log_p[..., list(openings)].exp().sum(dim=-1)
    projected = {site: axis.project(sweep.states[site].float().cpu().numpy()) for site, axis in axes.items()}
    rows = []
    for number, entry in enumerate(group):
        reference = group[plain[entry.query.id]]
        for token in range(_predicted(entry, tokens)):
            row = {**_about(system, entry), "token": token, "opening": float(opening[number, token])}
            row |= {f"projection {site}": float(values[number, token]) for site, values in projected.items()}
            compared = token < _predicted(reference, tokens)
            rows.append({**row, "kl": float(kl[number, token]) if compared else float("nan")})
    return rows


def _padded(omni: Omni, reply: Sequence[int], tokens: int) -> list[int]:
    return [*reply[:tokens], *[omni.end_id] * (tokens - len(reply))]


def _predicted(entry: Attacked, tokens: int) -> int:
    """How many tokens were predicted, the end of the turn included, up to `tokens`."""
    return min(tokens, len(entry.reply) + int(entry.ended))


def gate_tokens(casa: Casa, queries: Sequence[Query], batch_size: int = 64) -> list[list[int]]:
    """For each query, in a list of its own, the id of the token that the gate chooses before any prefill."""
    found: dict[int, list[int]] = {}
    for group in casa.omni.batches(queries, batch_size):
        batch = casa.omni.encode([queries[index] for index in group], prefill=False)
        pair: Tensor = gated_prompt(casa.omni, batch, casa.safety_gate, batch.gate_position, False).reading.pair
        chosen = (pair.argmax(dim=-1) == UNSAFE).tolist()
        found |= {index: [casa.token_ids[int(unsafe)]] for index, unsafe in zip(group, chosen, strict=True)}
    return [found[index] for index in range(len(queries))]


def _about(system: System, entry: Attacked) -> dict[str, Any]:
    query = entry.query
    named = {"system": system.name, "query_id": query.id, "label": query.label}
    return {**named, "topic": str(cluster_of(query)), "length": entry.length}
