"""Forwards over batches of queries: which sites and positions are read, and the identity of model and queries."""

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
from casa_mech.omni.memory import in_halves
from casa_mech.queries import Query
from casa_mech.trace.capture import Cut, Positions, capture_cuts, check_positions, make_cut
from casa_mech.trace.sites import Site, all_sites, check_sites


@dataclass(frozen=True)
class ReadingPlan:
    """Sites and positions that are read from every batch."""

    sites: tuple[Site, ...]
    """In the order in which the model runs them."""
    positions: tuple[Positions, ...]
    replies: Sequence[Sequence[int]] | None = None
    """Token ids of each query's reply, for `generated:<k>`; None: the model's own greedy reply."""
    prefill: bool = False
    """Whether the queries' assistant prefill is read too."""

    @classmethod
    def of(
        cls,
        omni: Omni,
        sites: Sequence[Site] | None,
        positions: Sequence[Positions] | Positions,
        replies: Sequence[Sequence[int]] | None = None,
        prefill: bool = False,
    ) -> ReadingPlan:
        """The plan of a call; `sites` None: every block's output and the final norm's.

        Raises:
            InputError: an unknown site or choice of positions, or none.
        """
        wanted = sites if sites is not None else [*range(omni.n_layers), "norm"]
        by_name = {str(site): site for site in all_sites(omni.n_layers)}
        order = check_sites([by_name.get(str(site), site) for site in wanted], omni.n_layers)
        choices = (positions,) if isinstance(positions, str) else tuple(dict.fromkeys(positions))
        if not order or not choices:
            raise InputError("nothing to collect: give at least one site and one choice of positions")
        return cls(tuple(order), tuple(check_positions(name) for name in choices), replies, prefill)

    @property
    def reply_tokens(self) -> int:
        """Number of tokens of the replies that are needed."""
        return max((1 + int(name.split(":")[1]) for name in self.positions if name.startswith("generated")), default=0)

    def run(
        self, queries: Sequence[Query], omni: Omni, batch_size: int, places: Sequence[int]
    ) -> Iterator[tuple[list[int], OmniBatch, list[Cut], dict[Site, list[Tensor]]]]:
        """(places, batch, cuts, states by site and cut) of one batch after the other.

        Args:
            queries: those to run; batches are of similar length, in no particular order.
            omni: the model.
            batch_size: queries in one forward; halved, with a warning, where they do not fit into memory.
            places: the place of each of `queries` in the caller's list, which names them in what is returned.

        Raises:
            InputError: a prompt beyond the model's positions, before any is run. RunError: states that are not finite.
        """
        omni.check_lengths(queries)

        def read(group: list[int]) -> tuple[OmniBatch, list[Cut], dict[Site, list[Tensor]]]:
            members = [queries[index] for index in group]
            targets = self._targets(omni, members, [places[index] for index in group])
            batch = omni.encode(members, targets, prefill=self.prefill)
            cuts = [make_cut(batch, name) for name in self.positions]
            states = capture_cuts(omni, batch, self.sites, cuts)
            _check_finite(states, cuts, members)
            return batch, cuts, states

        for group, read_states in in_halves(omni.batches(queries, batch_size), read):
            yield [places[index] for index in group], *read_states

    def _targets(self, omni: Omni, queries: Sequence[Query], places: Sequence[int]) -> list[list[int]] | None:
        count = self.reply_tokens
        if not count:
            return None
        if self.replies is not None:
            return [list(self.replies[place])[:count] for place in places]
        batch = omni.encode(queries, prefill=self.prefill)
        with torch.inference_mode():
            # A placeholder in the reply would ask the forward that reads it for another picture.
            never = sorted(omni.media_ids) or None
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


def _check_finite(states: Mapping[Site, list[Tensor]], cuts: Sequence[Cut], queries: Sequence[Query]) -> None:
    for site, by_cut in states.items():
        for cut, state in zip(cuts, by_cut, strict=True):
            if not torch.isfinite(state).all():
                bad = int((~torch.isfinite(state)).flatten(1).any(dim=1).nonzero()[0, 0])
                name = queries[int(cut.row[bad])].id
                raise RunError(f"query {name}: the states at site '{site}' are not finite; load the model in float32")
