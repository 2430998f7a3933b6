"""The index beside the vectors: what is known of each query, and where in its prompt each vector was read."""

from __future__ import annotations

from typing import Any

import numpy as np

from casa_mech.judging.stats import cluster_of
from casa_mech.omni.batch import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import Cut

INDEX_COLUMNS = ("query_id", "label", "surface", "attack", "topic", "category", "split")


def query_columns(query: Query) -> dict[str, str]:
    """The columns `INDEX_COLUMNS` of a query; the empty string where its maker said nothing.

    `topic` is by the rule of `casa_mech.judging.stats.cluster_of`: of a query that names none, the request itself, so
    that copies of one prompt are one topic.
    """
    said = {key: query.meta.get(key, "") for key in INDEX_COLUMNS[2:]}
    return {**said, **query_record(query), "label": query.label or ""}


def query_record(query: Query) -> dict[str, Any]:
    """`query_id`, `label` and `topic` of a query, the last by the rule of `casa_mech.judging.stats.cluster_of`."""
    return {"query_id": query.id, "label": query.label, "topic": str(cluster_of(query))}


def vector_columns(batch: OmniBatch, cut: Cut) -> dict[str, np.ndarray]:
    """The index's columns [pick] for the vectors of one cut; `row` is the query's row in the batch."""
    row, column = cut.row.cpu().numpy(), cut.column.cpu().numpy()
    media = {kind: batch.modality[kind] for kind in ("audio", "image")}
    if cut.mask is None:
        token, total = batch.inputs["input_ids"].cpu().numpy()[row, column], np.ones(len(row), dtype=int)
        counts = {kind: mask.cpu().numpy()[row, column].astype(int) for kind, mask in media.items()}
    else:
        token, total = np.full(len(row), -1), cut.mask.sum(dim=1).cpu().numpy()
        counts = {kind: (cut.mask & mask[cut.row]).sum(dim=1).cpu().numpy() for kind, mask in media.items()}
    return {
        "length": prompt_lengths(batch)[row],
        "position": np.full(len(row), cut.positions, dtype=object),
        "at": cut.at.cpu().numpy(),
        "token": token,
        "tokens": total,
        "audio_tokens": counts["audio"],
        "image_tokens": counts["image"],
        "row": row,
    }


def prompt_lengths(batch: OmniBatch) -> np.ndarray:
    """Tokens of each prompt, up to the assistant's header, int [batch]."""
    padding = (batch.inputs["attention_mask"] == 0).sum(dim=1)
    return (batch.gate_position + 1 - padding).cpu().numpy()
