"""Depth at which a prefill acts: states at its positions are exchanged with those of another opening.

Two runs over one request. In the attacked one the reply has been begun with the first k tokens of a complying answer;
in the other all but the last of them are a refusal's, so that both runs go on from the same token and differ in what
came before it. At one depth the attacked run gets the other's states at the opening's earlier positions, at its last
one, or at both. How far that takes the prediction of the answer's next token away says through which positions the
opening acts from that depth on: at first through its earlier ones alone, at the end through the last one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import BoolTensor, LongTensor

from casa_mech.errors import InputError
from casa_mech.judging.crossed import crossed_mean
from casa_mech.omni import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import capture
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.sites import Site
from probes.activations.index import query_record
from probes.gate.patching import exchanged
from probes.prefill.replies import gate_tokens
from probes.prefill.sweep import AttackedModel, compliance_ids

EARLIER, LAST, ALL = "earlier tokens", "last token", "all tokens"
SPANS = (EARLIER, LAST, ALL)


def depth_effects(
    system: AttackedModel, queries: Sequence[Query], length: int, refusal: str, batch_size: int = 32
) -> pd.DataFrame:
    """Effects of exchanging states at the opening's positions, depth by depth.

    Args:
        system: the model.
        queries: requests with `meta["compliance"]`; a prefill of their own is left out.
        length: tokens of both openings, at least 2.
        refusal: a text of at least `length - 1` tokens, with which the other opening begins.
        batch_size: queries in one forward.

    Returns:
        One row a query, depth and span (one of `SPANS`): `system, query_id, label, topic, site, span` and the
        log-probability (in nats) of the complying answer's next token in the `attacked` run, the `other` one and the
        `patched` one.

    Raises:
        InputError: a length below 2, or a refusal or an answer that is too short.
    """
    omni = system.omni
    refusing = omni.tokenizer(refusal, add_special_tokens=False)["input_ids"][: length - 1]
    if length < 2 or len(refusing) < length - 1:
        raise InputError(f"length {length} must be at least 2 and at most one more than the refusal has tokens")
    tokens = gate_tokens(system.casa, queries, batch_size) if system.casa else [[]] * len(queries)
    answers = compliance_ids(omni, queries, length + 1)
    tables = []
    for group in omni.batches(queries, batch_size):
        members = [queries[index] for index in group]
        attacked = [[*tokens[index], *answers[index][:length]] for index in group]
        other = [[*tokens[index], *refusing, answers[index][length - 1]] for index in group]
        runs = [omni.encode(members, forced, prefill=False) for forced in (attacked, other)]
        following = torch.tensor([answers[index][length] for index in group], device=omni.device)
        tables.append(_exchange(system, members, runs[0], runs[1], length, following))
    return pd.concat(tables, ignore_index=True)


def depth_changes(effects: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What an exchange changes, in nats, with an interval over topics and wordings: the mean of attacked - patched.

    Args:
        effects: of `depth_effects`, with the opening's wording in a column `phrasing`.
        seed: of the bootstrap.

    Returns:
        Columns `system, label, site, span, value, low, high, n` and `gap`, the mean of attacked - other, which the
        whole opening makes. No shares of it: where it is near 0, they mean nothing. Sites in the order of the model.
    """
    rows = []
    names = ["system", "label", "site", "span"]
    for where, group in effects.groupby(names, sort=False):
        change = (group["attacked"] - group["patched"]).to_numpy()
        mean = crossed_mean(change, group["topic"].tolist(), group["phrasing"].tolist(), seed)
        gap = float((group["attacked"] - group["other"]).mean())
        rows.append({**dict(zip(names, where, strict=True)), **mean._asdict(), "n": len(group), "gap": gap})
    return pd.DataFrame(rows)


def _exchange(
    system: AttackedModel,
    queries: list[Query],
    attacked: OmniBatch,
    other: OmniBatch,
    length: int,
    following: LongTensor,
) -> pd.DataFrame:
    omni = system.omni
    end = attacked.inputs["input_ids"].shape[1] - 1  # padding is on the left, so every row ends here
    position = torch.full_like(attacked.gate_position, end)
    depths: list[Site] = ["embeddings", *range(omni.n_layers)]
    donor = capture(omni, other, depths, "all")
    column = torch.arange(end + 1, device=omni.device)[None].expand(len(queries), -1)
    spans: dict[str, BoolTensor] = {EARLIER: (column > end - length) & (column < end), LAST: column == end}
    spans[ALL] = spans[EARLIER] | spans[LAST]

    def score(batch: OmniBatch, site: Site | None = None, span: BoolTensor | None = None) -> list[float]:
        edits = {} if site is None or span is None else {site: exchanged(donor[site], span)}
        log_p = torch.log_softmax(edited_prompt(omni, batch, position, edits).logits.float(), dim=-1)
        values: list[float] = log_p.gather(1, following[:, None])[:, 0].tolist()
        return values

    records = [query_record(query) for query in queries]
    base: dict[str, Any] = {
        "system": system.name,
        **{name: [record[name] for record in records] for name in ("query_id", "label", "topic")},
    }
    runs = {"attacked": score(attacked), "other": score(other)}
    return pd.concat(
        [
            pd.DataFrame({**base, "site": str(site), "span": name, **runs, "patched": score(attacked, site, span)})
            for site in depths
            for name, span in spans.items()
        ],
        ignore_index=True,
    )
