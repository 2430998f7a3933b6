"""Gated generation: the prompt's forward is traced with the gate in it, the rest is ordinary cached decoding.

Only the prompt needs an intervention. Tracing the whole of `generate` would run every decoding step under nnsight for
nothing; going on from the traced forward's cache costs what plain generation costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import LongTensor, Tensor

from casa_mech.omni import Omni, OmniBatch


def continue_from(
    omni: Omni,
    batch: OmniBatch,
    cache: Any,
    forced: Sequence[Sequence[int]],
    rows: Sequence[int],
    kwargs: dict[str, object],
) -> Tensor:
    """Decode on from a traced prompt: first the `forced` ids of each query, then freely.

    Args:
        omni: the model; its last forward must have been the one over `batch` that filled `cache`.
        batch: the prompts.
        cache: keys and values of the prompts; used up by this call.
        forced: for each of `rows` the ids that follow its prompt (safety token, prefill), at least one.
        rows: which queries of the batch to go on with; the others are dropped.
        kwargs: of `model.generate`.

    Returns:
        Ids [row, new position] after the forced ones.
    """
    index = torch.tensor(list(rows), device=omni.device)
    ids = batch.inputs["input_ids"].to(omni.device)[index]
    mask = batch.inputs["attention_mask"].to(omni.device)[index]
    if len(rows) < batch.size:
        cache.batch_select_indices(index)
        # Text decoded after a picture counts on from the picture's M-RoPE positions; the model keeps the offset.
        omni.set_text_offset(omni.text_offset(batch.size)[index])
    added, real = _left_padded(forced, omni.pad_id, omni.device)
    ids, mask = torch.cat([ids, added], dim=1), torch.cat([mask, real], dim=1)
    sequences = omni.model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **kwargs)
    return sequences[:, ids.shape[1] :]


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[LongTensor, LongTensor]:
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    real = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)
