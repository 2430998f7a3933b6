"""Safety attention's weights over words, picture and sound, and the directions that it reads.

The weights say where the gate looks, not what that is worth: `probes.gate.removal` takes positions away, and
`probes.gate.patching` exchanges the states at them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import beta
from torch import BoolTensor, Tensor

from casa_mech.casa import Casa
from casa_mech.casa.attention import SAFE, UNSAFE
from casa_mech.judging.bootstrap import bootstrap_interval
from casa_mech.judging.stats import cluster_of
from casa_mech.omni import Omni, OmniBatch
from casa_mech.omni.chat import media_parts
from casa_mech.queries import ImagePart, Query
from casa_mech.queries.media import load_image
from casa_mech.trace.sweep import Sweep, read_positions
from probes.gate.positions import KEY, ROLES, key_positions, position_roles


@dataclass(frozen=True)
class MediumMap:
    """Safety attention over one picture or clip of a prompt."""

    kind: str
    """"image" or "audio"."""
    content: np.ndarray
    """The picture, uint8 [height, width, 3]; of a clip the log-mel spectrogram [mel, frame]."""
    weights: np.ndarray
    """[row, column] over the picture, or [position] along the clip."""


@dataclass(frozen=True)
class AttentionMap:
    """Safety attention over one prompt; `position` counts its real positions, padding left out."""

    query_id: str
    label: str
    topic: str
    v_s: float
    tokens: tuple[str, ...]
    """[position], as strings."""
    roles: tuple[str, ...]
    """[position], names of `ROLES`."""
    weights: np.ndarray
    """[position], 0 where safety attention may not read."""
    key: np.ndarray
    """bool [position]: the key word is written there."""
    media: tuple[MediumMap, ...] = ()
    """Its pictures and clips, in reading order."""


def attention_maps(casa: Casa, queries: Sequence[Query], batch_size: int = 32) -> list[AttentionMap]:
    """Maps of safety attention over each prompt, in the order of the queries; a prefill is left out.

    Raises:
        InputError: a gate without safety attention, or media that cannot be read.
    """
    attention = casa.attention
    maps: list[AttentionMap | None] = [None] * len(queries)
    for group in casa.omni.batches(queries, batch_size):
        members = [queries[index] for index in group]
        batch, sweep, mask = gate_inputs(casa, members)
        with torch.no_grad():
            v_s, weights = attention(whole_states(sweep), mask)
        for index, attention_map in zip(
            group, prompt_maps(casa.omni, batch, members, v_s.tolist(), weights), strict=True
        ):
            maps[index] = attention_map
    return [attention_map for attention_map in maps if attention_map is not None]


def prompt_maps(
    omni: Omni, batch: OmniBatch, queries: Sequence[Query], v_s: Sequence[float], weights: Tensor
) -> list[AttentionMap]:
    """The maps of a batch of prompts, of which v_s and the weights [batch, position] are known."""
    roles, key = position_roles(batch), key_positions(omni, batch, queries)
    real = batch.inputs["attention_mask"].bool()
    all_media = _media(omni, batch, queries, weights)
    return [
        AttentionMap(
            query_id=query.id,
            label=query.label or "",
            topic=str(cluster_of(query)),
            v_s=v_s[row],
            tokens=tuple(
                omni.tokenizer.decode([token]).strip() for token in batch.inputs["input_ids"][row][real[row]].tolist()
            ),
            roles=tuple(ROLES[role] for role in roles[row][real[row]].tolist()),
            weights=weights[row].float().cpu().numpy()[real[row].cpu().numpy()],
            key=key[row][real[row]].cpu().numpy(),
            media=all_media[row],
        )
        for row, query in enumerate(queries)
    ]


def word_shares(attention: AttentionMap) -> tuple[list[str], np.ndarray]:
    """Each token that may be read with its share of safety attention; the positions of a medium are one entry."""
    names: list[str] = []
    weights: list[float] = []
    for token, role, weight in zip(attention.tokens, attention.roles, attention.weights, strict=True):
        if role in ("image", "audio") and names and names[-1] == f"[{role}]":
            weights[-1] += float(weight)
        elif role not in ("padding", "other") or weight > 0:
            names.append(f"[{role}]" if role in ("image", "audio") else token)
            weights.append(float(weight))
    return names, np.array(weights) / max(attention.weights.sum(), 1e-12)


def attention_shares(maps: Sequence[AttentionMap]) -> pd.DataFrame:
    """Share of the attention on each span of each prompt: the key word, other text, picture, clip, header.

    Returns:
        One row a query and span that it has: `query_id, label, topic, v_s, span, share, positions` and `even`, the
        share under equal weights on all positions read. A query's shares sum to 1.
    """
    rows: list[dict[str, Any]] = []
    for entry in maps:
        roles = np.array([KEY if key else role for role, key in zip(entry.roles, entry.key, strict=True)])
        total, read = entry.weights.sum(), entry.weights > 0
        for span in (KEY, *ROLES[2:]):
            here = (roles == span) & read
            if here.any():
                rows.append(
                    {
                        "query_id": entry.query_id,
                        "label": entry.label,
                        "topic": entry.topic,
                        "v_s": entry.v_s,
                        "span": "other text" if span == "text" else span,
                        "share": float(entry.weights[here].sum() / total),
                        "positions": int(here.sum()),
                        "even": float(here.sum() / read.sum()),
                    }
                )
    return pd.DataFrame(rows)


def gate_directions(casa: Casa) -> dict[str, np.ndarray]:
    """The directions [d_model] along which states at the gate's layer move it.

    `query`: W_kᵀ W_q e_unsafe, which draws attention (for `compete`, against the safe class's); `read-out`
    (`pooled` only): W_vᵀ u, which raises v_s once attended to; `token difference`: the two safety tokens' rows of the
    head, unsafe minus safe.

    Raises:
        InputError: a gate without safety attention.
    """
    module = casa.attention
    with torch.no_grad():
        queries = module.w_q(module.class_embeddings)
        query = queries[UNSAFE] - queries[SAFE] if module.form == "compete" else queries[UNSAFE]
        directions = {"query": query @ module.w_k.weight}
        if module.form == "pooled":
            directions["read-out"] = module.readout.weight[0] @ module.w_v.weight
        rows = casa.omni.head.weight[list(casa.token_ids)].float()
        directions["token difference"] = rows[UNSAFE] - rows[SAFE]
    return {name: vector.float().cpu().numpy() for name, vector in directions.items()}


def cosine_table(
    gate: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    states: np.ndarray,
    harmful: np.ndarray,
    clusters: Sequence[Hashable],
    seed: int = 0,
) -> pd.DataFrame:
    """Cosines of the gate's directions with others, and with the difference in means of `states`.

    Args:
        gate: directions [d_model] by name (`gate_directions`).
        others: refusal and probe directions [d_model] by name, in the same space.
        states: [query, d_model] at the gate's layer.
        harmful: bool [query].
        clusters: [query], of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Columns `gate_direction, direction, cosine, low, high, n` and `chance`, the |cosine| that 95 % of random
        directions of this width stay under. Intervals for the difference in means (clusters resampled), else NaN.
    """
    width = states.shape[1]
    chance = 2 * float(beta.ppf(0.975, (width - 1) / 2, (width - 1) / 2)) - 1
    rows = []
    for name, direction in gate.items():
        unit = direction / np.linalg.norm(direction)

        def along(weights: np.ndarray, unit: np.ndarray = unit) -> np.ndarray:
            of_harmful, of_benign = weights * harmful, weights * ~harmful
            with np.errstate(invalid="ignore", divide="ignore"):
                harmful_mean = of_harmful @ states / of_harmful.sum(1, keepdims=True)
                gap = harmful_mean - of_benign @ states / of_benign.sum(1, keepdims=True)
                return gap @ unit / np.linalg.norm(gap, axis=1)

        low, high = bootstrap_interval(along, clusters, len(states), seed)
        cosine = float(along(np.ones((1, len(states))))[0])
        rows.append((name, "difference in means", cosine, low, high))
        rows += [
            (name, other, float(vector @ unit / np.linalg.norm(vector)), np.nan, np.nan)
            for other, vector in others.items()
        ]
    columns = ["gate_direction", "direction", "cosine", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(n=len(states), chance=chance)


def gate_inputs(casa: Casa, queries: Sequence[Query]) -> tuple[OmniBatch, Sweep, BoolTensor]:
    """The prompts as a batch, the gate's input states and logits, and the mask [batch, position] of what it reads.

    The sweep has the gate's position alone [batch, 1] and the states at the gate's layer whole (`whole_states`). A
    prefill is left out.
    """
    gate = casa.safety_gate
    batch = casa.omni.encode(queries, prefill=False)
    return batch, read_positions(casa.omni, batch, batch.gate_position[:, None], [], gate.layer), gate.mask(batch)


def whole_states(sweep: Sweep) -> Tensor:
    """The states [batch, position, d_model] of the site that the sweep kept whole."""
    assert sweep.whole is not None
    return sweep.whole


def _media(omni: Omni, batch: OmniBatch, queries: Sequence[Query], weights: Tensor) -> list[tuple[MediumMap, ...]]:
    """For each query its pictures and clips with the weights [batch, position] over them."""
    media: list[tuple[MediumMap, ...]] = []
    images = clips = 0
    for row, query in enumerate(queries):
        runs = {kind: iter(_runs(weights[row], batch.modality[kind][row])) for kind in ("image", "audio")}
        maps: list[MediumMap] = []
        for medium in media_parts(query):
            over = next(runs[medium.kind])
            if isinstance(medium, ImagePart):
                merge = omni.processor.image_processor.merge_size
                _, height, width = batch.inputs["image_grid_thw"][images].tolist()
                picture = np.asarray(load_image(medium, f"query {query.id}"))
                maps.append(MediumMap("image", picture, over.reshape(height // merge, width // merge)))
                images += 1
            else:
                frames = int(batch.inputs["feature_attention_mask"][clips].sum())
                spectrogram = batch.inputs["input_features"][clips, :, :frames].float().cpu().numpy()
                maps.append(MediumMap("audio", spectrogram, over))
                clips += 1
        media.append(tuple(maps))
    return media


def _runs(weights: Tensor, here: BoolTensor) -> list[np.ndarray]:
    """The weights [position] of each run of positions that are `here`; a medium's marks part it from the next."""
    places = np.flatnonzero(here.cpu().numpy())
    cuts = np.flatnonzero(np.diff(places) > 1) + 1
    return [weights.float().cpu().numpy()[run] for run in np.split(places, cuts)]
