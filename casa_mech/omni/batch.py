"""`OmniBatch`: queries as one left-padded batch, with masks that say what each position is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.errors import InputError
from casa_mech.omni.chat import PROMPT_ROLES, ROLES, MediaRuns, Piece, chat_pieces, media_parts
from casa_mech.omni.processor import Processor, placeholder_ids
from casa_mech.queries import ImagePart, Query
from casa_mech.queries.media import load_audio, load_image

IGNORE = -100


@dataclass(frozen=True)
class OmniBatch:
    """Inputs of the model for a batch of queries, and the meaning of their positions. Rows are padded on the left."""

    inputs: dict[str, Tensor]
    """Arguments of the model: `input_ids`, `attention_mask` [batch, position]; where there are media `pixel_values`,
    `image_grid_thw`, `input_features`, `feature_attention_mask`. Position ids are left to the model, which computes its
    own M-RoPE."""
    prompt_mask: BoolTensor
    """[batch, position]: content of user turns and the assistant header, which safety attention may read."""
    modality: dict[str, BoolTensor]
    """For "text", "image" and "audio" the positions [batch, position] of that modality within the user's turns."""
    gate_position: LongTensor
    """[batch]: the assistant header's last token, whose logits predict the turn's first token."""
    last_position: LongTensor
    """[batch]: the last position before targets; equals `gate_position` unless there is a prefill."""
    labels: LongTensor | None = None
    """[batch, position]: the targets, -100 where there is none; None for a batch without targets."""

    @property
    def size(self) -> int:
        """Number of queries."""
        return self.inputs["input_ids"].shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> OmniBatch:
        """The batch on `device`; with `dtype`, the pictures' and clips' features in it."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype) if dtype is not None and tensor.is_floating_point() else tensor.to(device)

        return replace(
            self,
            inputs={key: move(value) for key, value in self.inputs.items()},
            prompt_mask=self.prompt_mask.to(device),
            modality={key: value.to(device) for key, value in self.modality.items()},
            gate_position=self.gate_position.to(device),
            last_position=self.last_position.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )


def encode(
    processor: Processor,
    queries: Sequence[Query],
    targets: Sequence[Sequence[int]] | None = None,
    prefill: bool = True,
) -> OmniBatch:
    """`queries` as one batch; `targets` are token ids appended to each prompt and set as labels.

    Raises:
        InputError: an empty prompt, or a picture or clip that cannot be read, or that the model has no encoder for (the
            message names the query).
    """
    media, runs = _encode_media(processor, queries)
    rows = _tokenise(processor, _pieces(processor, queries, runs, prefill))
    tails = [list(target) for target in targets] if targets is not None else [[] for _ in rows]
    batch = _pad(processor, rows, tails, media, targets is not None)
    if media and processor.token_types:
        is_image = batch.inputs["input_ids"] == placeholder_ids(processor)["image"]
        batch.inputs["mm_token_type_ids"] = is_image.long()
    return batch


def prompt_ids(processor: Processor, batch: OmniBatch, queries: Sequence[Query]) -> list[list[int]]:
    """Token ids of the prompts of `queries`, whose pictures and clips are those of the batch's first rows.

    How many tokens a picture or clip takes is read off the batch, so no media are opened again.
    """
    ids_of = placeholder_ids(processor)
    runs: dict[str, list[str]] = {
        kind: [
            marks.token * length
            for row in batch.inputs["input_ids"][: len(queries)]
            for length in run_lengths(row.tolist(), ids_of[kind])
        ]
        for kind, marks in processor.marks.items()
    }
    pieces = _pieces(processor, queries, MediaRuns(runs.get("image", []), runs.get("audio", [])), True)
    return [ids for ids, _ in _tokenise(processor, pieces)]


def _pieces(processor: Processor, queries: Sequence[Query], runs: MediaRuns, prefill: bool) -> list[list[Piece]]:
    special = processor.tokenizer.all_special_tokens
    options = (special, processor.chat, processor.marks, prefill, processor.gate_tokens)
    return [chat_pieces(query, runs, *options) for query in queries]


def run_lengths(row: Sequence[Any], wanted: Any) -> list[int]:
    """Lengths of the runs of `wanted` in a row of ids or flags; a picture's or clip's run has its marks around it."""
    return [len(list(group)) for value, group in groupby(row) if value == wanted]


def _encode_media(processor: Processor, queries: Sequence[Query]) -> tuple[dict[str, Tensor], MediaRuns]:
    images, clips = [], []
    for query in queries:
        for part in media_parts(query):
            if part.kind not in processor.marks:
                known = " and ".join(["text", *processor.marks])
                raise InputError(f"query {query.id}: this model reads no {part.kind}; give it {known}")
            if isinstance(part, ImagePart):
                images.append(load_image(part, f"query {query.id}"))
            else:
                clips.append(load_audio(part, f"query {query.id}"))
    inputs: dict[str, Tensor] = {}
    image_runs: list[str] = []
    audio_runs: list[str] = []
    if images:
        features, image_runs = processor.images(images)
        inputs |= features
    if clips:
        features, audio_runs = processor.audio(clips)
        inputs |= features
    return inputs, MediaRuns(image_runs, audio_runs)


def _tokenise(processor: Processor, prompts: list[list[Piece]]) -> list[tuple[list[int], list[int]]]:
    """For each prompt its token ids and, for each token, the index in `ROLES` of the piece it starts in."""
    encoding = processor.tokenizer(
        ["".join(piece.text for piece in pieces) for pieces in prompts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    tokenised = []
    for pieces, ids, offsets in zip(prompts, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        ends, total = [], 0
        for piece in pieces:
            total += len(piece.text)
            ends.append(total)
        roles, at = [], 0
        for start, _ in offsets:
            while at < len(ends) - 1 and start >= ends[at]:
                at += 1
            roles.append(ROLES.index(pieces[at].role))
        tokenised.append((ids, roles))
    return tokenised


def _pad(
    processor: Processor,
    rows: list[tuple[list[int], list[int]]],
    tails: list[list[int]],
    media: dict[str, Tensor],
    with_labels: bool,
) -> OmniBatch:
    length = max(len(ids) + len(tail) for (ids, _), tail in zip(rows, tails, strict=True))
    size = len(rows)
    pad = processor.tokenizer.pad_token_id or 0
    input_ids = torch.full((size, length), pad, dtype=torch.long)
    roles = torch.full((size, length), -1, dtype=torch.long)
    attention_mask = torch.zeros((size, length), dtype=torch.long)
    labels = torch.full((size, length), IGNORE, dtype=torch.long)
    last = torch.empty(size, dtype=torch.long)
    for row, ((ids, kinds), tail) in enumerate(zip(rows, tails, strict=True)):
        start, end = length - len(ids) - len(tail), length - len(tail)
        input_ids[row, start:] = torch.tensor(ids + tail)
        attention_mask[row, start:] = 1
        roles[row, start:end] = torch.tensor(kinds)
        if tail:
            labels[row, end:] = torch.tensor(tail)
        last[row] = end - 1
    header = roles == ROLES.index("header")
    gate = (header * torch.arange(length)).argmax(dim=1)
    prompt = torch.isin(roles, torch.tensor([ROLES.index(role) for role in PROMPT_ROLES]))
    return OmniBatch(
        inputs={"input_ids": input_ids, "attention_mask": attention_mask, **media},
        prompt_mask=prompt,
        modality={kind: roles == ROLES.index(kind) for kind in ("text", "image", "audio")},
        gate_position=gate,
        last_position=last,
        labels=labels if with_labels else None,
    )
