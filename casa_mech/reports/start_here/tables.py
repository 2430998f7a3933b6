"""Notebook 00: prompts of the reader's own through the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from casa_mech.casa import Casa
from casa_mech.display import Html, html
from casa_mech.queries import Query
from probes.gate.looks import Look, look

_MEDIA = {"image": "pictures", "audio": "speech"}


def look_at(casa: Casa, query: Query) -> Look | Html:
    """`probes.look`, or one line where the model has no encoder for a medium of the query."""
    unread = sorted(query.modalities - set(casa.omni.modalities))
    if unread:
        media = " and ".join(_MEDIA[kind] for kind in unread)
        return html("problem", problem=f"{casa.omni.source} reads no {media}: this cell has nothing to show.")
    return look(casa, query)


def attention_data(looks: Sequence[Look]) -> pd.DataFrame:
    """Safety attention over each prompt: `prompt, surface, label, v_s, position, token, role, ...`."""
    tables = [
        seen.table.assign(prompt=seen.query.id, surface=seen.query.surface, label=seen.query.label or "", v_s=seen.v_s)
        for seen in looks
    ]
    data = pd.concat(tables, ignore_index=True)
    return data[["prompt", "surface", "label", "v_s", "position", "token", "role", "weight", "share"]]


def readings(casa: Casa, prompts: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The gate's decisions on texts by label: `label, prompt, safety_token, v_s`, the highest v_s first."""
    rows = [(label, text) for label, texts in prompts.items() for text in texts]
    replies = casa.decide([text for _, text in rows])
    table = pd.DataFrame(rows, columns=["label", "prompt"])
    table = table.assign(safety_token=[reply.safety_token for reply in replies], v_s=[reply.v_s for reply in replies])
    return table.sort_values("v_s", ascending=False, ignore_index=True)
