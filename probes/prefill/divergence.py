"""KL between a model and the one that it was trained from, token by token of one forced continuation.

After "Safety alignment should be made more than just a few tokens deep" (arXiv 2406.05946, its figure of the KL along
harmful answers): both models are given the same tokens, so that what differs is their prediction and not what they
wrote. An alignment is shallow where the divergence is concentrated on the first tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from casa_mech.divergence import kl_divergence
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.sweep import read_positions
from probes.activations.index import query_record
from probes.prefill.replies import gate_tokens
from probes.prefill.sweep import AttackedModel, compliance_ids


def forced_divergence(
    system: AttackedModel,
    base: Callable[[], AbstractContextManager[Omni]],
    queries: Sequence[Query],
    tokens: int,
    batch_size: int = 32,
) -> pd.DataFrame:
    """KL(system ‖ base) of the prediction of each of the first `tokens` tokens of the complying answers.

    A gate's token stands before the answer in the gated model's run, and in no other. Tokens that the base model does
    not have, the safety tokens, are left out of the prediction.

    Args:
        system: the trained model.
        base: the model without that training, for the length of a block, again and again; with the same tokenizer.
        queries: requests with `meta["compliance"]`.
        tokens: how many of the answer.
        batch_size: queries in one forward.

    Returns:
        One row a query and token: `system, query_id, label, topic, position` (0: the answer's first token, predicted
        at the header or the safety token) and `kl` in nats.

    Raises:
        InputError: fewer than one token, or an answer that is missing or too short.
    """
    if tokens < 1:
        raise InputError(f"a divergence along a continuation needs at least 1 token, not {tokens}")
    omni = system.omni
    own = gate_tokens(system.casa, queries, batch_size) if system.casa else [[]] * len(queries)
    answers = compliance_ids(omni, queries, tokens)
    tables = []
    for group in omni.batches(queries, batch_size):
        members = [queries[index] for index in group]
        forced = [answers[index][: tokens - 1] for index in group]
        with base() as untrained:
            log_q = _log_probabilities(untrained, members, forced, tokens)
        log_p = _log_probabilities(
            omni, members, [[*own[index], *ids] for index, ids in zip(group, forced, strict=True)], tokens,
            log_q.shape[-1],
        )  # fmt: skip
        index = pd.DataFrame([query_record(query) for query in members])
        table = index.loc[index.index.repeat(tokens)].reset_index(drop=True)
        table["position"] = np.tile(np.arange(tokens), len(members))
        tables.append(table.assign(kl=kl_divergence(log_p, log_q).cpu().numpy().reshape(-1)))
    result = pd.concat(tables, ignore_index=True)
    result.insert(0, "system", system.name)
    return result


def _log_probabilities(
    omni: Omni, queries: list[Query], forced: list[list[int]], tokens: int, vocab: int | None = None
) -> Tensor:
    """Log-probabilities [query, token, vocab] at the last `tokens` positions, over the first `vocab` tokens."""
    batch = omni.encode(queries, forced, prefill=False)
    end = batch.inputs["input_ids"].shape[1]  # rows end together: each is forced to as many tokens
    positions = torch.arange(end - tokens, end, device=omni.device)[None].expand(len(queries), -1)
    logits = read_positions(omni, batch, positions, []).logits.float()
    return torch.log_softmax(logits[..., :vocab], dim=-1)
