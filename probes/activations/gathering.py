"""One batch after the other through the model, with what is read and what is known of each vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from casa_mech.errors import InputError, RunError
from casa_mech.identity import SHORT, adapted_fingerprint, query_digest
from casa_mech.omni import Omni
from casa_mech.omni.batch import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import Cut, Positions, capture_cuts, check_positions, make_cut
from casa_mech.trace.sites import Site, all_sites, check_sites

INDEX_COLUMNS = ("query_id", "label", "surface", "attack", "topic", "category", "split")


@dataclass(frozen=True)
class Plan:
    """What is read from each batch."""

    sites: tuple[Site, ...]
    positions: tuple[Positions, ...]
    replies: Sequence[Sequence[int]] | None
    prefill: bool

    @classmethod
    def of(
        cls,
        omni: Omni,
        sites: Sequence[Site] | None,
        positions: Sequence[Positions] | Positions,
        replies: Sequence[Sequence[int]] | None = None,
        prefill: bool = False,
    ) -> Plan:
        """The plan of a call.

        Raises:
            InputError: an unknown site or choice of positions, or none.
        """
        wanted = sites if sites is not None else [*range(omni.n_layers), "norm"]
        names = {str(site): site for site in all_sites(omni.n_layers)}
        order = check_sites([names.get(str(site), site) for site in wanted], omni.n_layers)
        chosen = (positions,) if isinstance(positions, str) else tuple(dict.fromkeys(positions))
        if not order or not chosen:
            raise InputError("nothing to collect: give at least one site and one choice of positions")
        return cls(tuple(order), tuple(check_positions(name) for name in chosen), replies, prefill)

    @property
    def reply_tokens(self) -> int:
        """How many tokens of the replies are needed."""
        return max((1 + int(name.split(":")[1]) for name in self.positions if name.startswith("generated")), default=0)

    def run(
        self, queries: Sequence[Query], omni: Omni, batch_size: int, places: Sequence[int]
    ) -> Iterator[tuple[list[int], OmniBatch, list[Cut], dict[Site, list[Tensor]]]]:
        """(places, batch, cuts, states by site and cut) of groups of `queries`, whose places in the whole are given."""
        for group in omni.batches(queries, batch_size):
            chosen = [queries[member] for member in group]
            where = [places[member] for member in group]
            batch = omni.encode(chosen, self._targets(omni, chosen, where), prefill=self.prefill)
            cuts = [make_cut(batch, name) for name in self.positions]
            states = capture_cuts(omni, batch, self.sites, cuts)
            _check_finite(states, cuts, chosen)
            yield where, batch, cuts, states

    def _targets(self, omni: Omni, queries: Sequence[Query], where: Sequence[int]) -> list[list[int]] | None:
        count = self.reply_tokens
        if not count:
            return None
        if self.replies is not None:
            return [list(self.replies[place])[:count] for place in where]
        batch = omni.encode(queries, prefill=self.prefill)
        with torch.inference_mode():
            # A placeholder in the reply would ask the forward that reads it for another picture.
            never = media_tokens(omni)
            ids = omni.model.generate(**batch.inputs, max_new_tokens=count, do_sample=False, suppress_tokens=never)
        return [omni.until_end(row) for row in ids[:, batch.inputs["input_ids"].shape[1] :].tolist()]


def fingerprint(omni: Omni) -> str:
    """The model's fingerprint; with LoRA at work in it, one that tells the LoRA's weights apart too."""
    return adapted_fingerprint(omni.fingerprint(), omni.model)


def query_digests(queries: Sequence[Query]) -> np.ndarray:
    """A short digest of each query with the content of its media, str [query].

    Raises:
        InputError: a picture or clip whose file is not there.
    """
    return np.array([query_digest(query)[:SHORT] for query in queries], dtype=object)


def index_columns(batch: OmniBatch, cut: Cut) -> dict[str, np.ndarray]:
    """The index's columns [pick] that tell where the vectors of one cut come from; `row` is the query in the batch."""
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


def media_tokens(omni: Omni) -> list[int]:
    """Ids of the placeholders for pictures, clips and videos."""
    config = omni.model.config
    return [config.image_token_id, config.audio_token_id, config.video_token_id]


def known_of(query: Query) -> dict[str, str]:
    """The columns `INDEX_COLUMNS` of a query."""
    about = {key: query.meta.get(key, "") for key in INDEX_COLUMNS[2:]}
    return {"query_id": query.id, "label": query.label or "", **about}


def prompt_lengths(batch: OmniBatch) -> np.ndarray:
    """Tokens of each prompt, up to the assistant's header [batch]."""
    padding = (batch.inputs["attention_mask"] == 0).sum(dim=1)
    return (batch.gate_position + 1 - padding).cpu().numpy()


def _check_finite(states: Mapping[Site, list[Tensor]], cuts: Sequence[Cut], queries: Sequence[Query]) -> None:
    for site, found in states.items():
        for cut, state in zip(cuts, found, strict=True):
            if not torch.isfinite(state).all():
                bad = int((~torch.isfinite(state)).flatten(1).any(dim=1).nonzero()[0, 0])
                name = queries[int(cut.row[bad])].id
                raise RunError(f"query {name}: the states at site '{site}' are not finite; load the model in float32")
