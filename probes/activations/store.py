"""Hidden states of many queries at many sites and positions: collected once, kept on disk, read without this package.

A store is a folder:

* `store.json`: `format`, the model's `fingerprint` and `source`, `sites` (in the order in which the model runs them),
  `positions` and `dtype`;
* `shards/00000.safetensors`, ...: for each site one tensor by its name, [row, d_model], or [row, head, d_head] for the
  sites `z.<layer>`;
* `index/00000.parquet`, ...: beside each shard what its rows are. `pandas.read_parquet("STORE/index")` reads all.
  Columns: `query_id` and what else is known of the query (`INDEX_COLUMNS`); `order`, the query's place in the store;
  `digest` of its content, media included; `length` of its prompt in tokens; `position`, the choice of positions that
  this row belongs to; `at`, the token's number in the prompt (in the reply for `generated`, in the prefill for
  `prefill`; -1 for a mean); `token`, its id (-1 for a mean); `tokens`, how many positions the vector is the mean of (1
  if it is none), and `audio_tokens` and `image_tokens`, how many of those an encoder filled (where 0, that encoder's
  vector is zero and stands for nothing); `shard` and `row`.

Rows of one position are consecutive in a shard. Shards are written whole and mapped into memory when read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from casa_mech.errors import InputError, RunError
from casa_mech.files import check_folder
from casa_mech.omni import Omni
from casa_mech.omni.batch import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import Cut, Positions
from casa_mech.trace.sites import ENCODERS, Site
from probes.activations.gathering import (
    INDEX_COLUMNS,
    Plan,
    fingerprint,
    index_columns,
    known_of,
    prompt_lengths,
    query_digests,
)
from probes.activations.shards import next_number, read_about, read_index, shard_tensor, write_about, write_part


@dataclass(frozen=True)
class Activations:
    """One vector a query and site, in memory, and the queries they belong to.

    states: for each site, in the order in which the model runs them, float32 [query, d_model].
    index: one row a query, with `INDEX_COLUMNS` (empty string where the query's maker said nothing) and `length`, the
    prompt's number of tokens.
    positions: which positions were read (see `casa_mech.trace.capture.Positions`).
    """

    states: dict[str, np.ndarray]
    index: pd.DataFrame
    positions: str

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names, in the order in which the model runs them."""
        return tuple(self.states)

    @property
    def harmful(self) -> np.ndarray:
        """bool [query]: which queries are labelled harmful."""
        return (self.index["label"] == "harmful").to_numpy()

    @property
    def topics(self) -> np.ndarray:
        """str [query]: what folds and intervals keep together: each query's topic, or itself where it has none.

        The same rule as `casa_mech.judging.stats.cluster_of`.
        """
        topic = self.index["topic"]
        return topic.where(topic != "", self.index["query_id"]).to_numpy(dtype=str)

    def stacked(self, sites: Sequence[str] = ()) -> np.ndarray:
        """[site, query, d_model] of `sites`, all when not given.

        Raises:
            InputError: a site that was not collected.
        """
        return np.stack([self.at(site) for site in sites or self.sites])

    def at(self, site: str) -> np.ndarray:
        """[query, d_model] at `site`.

        Raises:
            InputError: it was not collected; the message lists what was.
        """
        if site not in self.states:
            raise InputError(f"no activations at site '{site}'; collected were {', '.join(self.sites)}")
        return self.states[site]

    def where(self, **values: str) -> Activations:
        """The queries whose index columns have these values, such as `where(surface="audio")`.

        Raises:
            InputError: no query has them.
        """
        keep = np.ones(len(self.index), dtype=bool)
        for column, value in values.items():
            keep &= (self.index[column] == value).to_numpy()
        if not keep.any():
            raise InputError(f"no activations with {values}")
        states = {site: array[keep] for site, array in self.states.items()}
        return Activations(states, self.index[keep].reset_index(drop=True), self.positions)


class ActivationStore:
    """Activations on disk. Make one with `ActivationStore.collect`, open one with `ActivationStore.open`."""

    def __init__(self, root: Path, about: Mapping[str, Any], index: pd.DataFrame) -> None:
        self.root, self._about, self._index = root, about, index

    @classmethod
    def open(cls, root: Path | str, omni: Omni | None = None) -> ActivationStore:
        """The store at `root`; with `omni`, only if that model made it.

        Raises:
            RunError: no store, another model's, or index and shards that are damaged or disagree.
        """
        root = Path(root)
        about = read_about(root)
        if omni is not None and about["fingerprint"] != fingerprint(omni):
            raise RunError(
                f"{root} holds activations of {about['source']} ({about['fingerprint'][:8]}…), not of {omni.source} as "
                f"it is now ({fingerprint(omni)[:8]}…): collect into another folder"
            )
        return cls(root, about, read_index(root, list(about["sites"])))

    @classmethod
    def collect(
        cls,
        omni: Omni,
        queries: Sequence[Query],
        sites: Sequence[Site] | None = None,
        positions: Sequence[Positions] | Positions = ("last",),
        out: Path | str = "activations",
        *,
        replies: Sequence[Sequence[int]] | None = None,
        prefill: bool = False,
        batch_size: int = 32,
        shard_mb: int = 256,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> ActivationStore:
        """Hidden states of `queries`, added to the store `out`; queries that it holds already are passed over.

        One forward a batch serves all sites and positions and stops after the deepest site. A run that was stopped is
        continued by the same call, from the last whole shard.

        Args:
            omni: the model; whatever is attached to it (LoRA) takes part and is part of its fingerprint.
            queries: any mixture of text, image and audio; id and content together tell them apart, so one whose
                picture or clip has changed since is another query, and its states stand beside the earlier ones.
            sites: where to read (`casa_mech.trace.sites.Site`); default every block's output and the final norm's.
            positions: one or several choices (`casa_mech.trace.capture.Positions`).
            out: the store's folder.
            replies: token ids of each query's reply, for `generated:<k>`; default the model's own greedy reply.
            prefill: whether the queries' assistant prefill is read too.
            batch_size: queries in one forward.
            shard_mb: megabytes at which a shard is closed; no more than that is held in memory.
            dtype: of what is stored; default the model's own.
            progress: whether to draw a bar.

        Raises:
            InputError: an unknown site or position, a query that comes twice or cannot be encoded, or a store that was
                begun with other sites or positions.
            RunError: the store is another model's or damaged; states that are not finite; the disk is full.
        """
        plan = Plan.of(omni, sites, positions, replies, prefill)
        store = cls._begin(Path(out), omni, plan, dtype or omni.dtype)
        todo = store._missing(queries)
        part = _Part(store, queries, shard_mb * 2**20)
        from tqdm import tqdm

        with tqdm(
            total=len(queries), initial=len(queries) - len(todo), disable=not progress, desc="activations"
        ) as bar:
            for group, batch, cuts, states in plan.run([queries[place] for place in todo], omni, batch_size, todo):
                part.add(group, batch, cuts, states)
                bar.update(len(group))
        part.flush()
        return cls.open(out)

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names, in the order in which the model runs them."""
        return tuple(self._about["sites"])

    @property
    def positions(self) -> tuple[str, ...]:
        """The choices of positions that were collected."""
        return tuple(self._about["positions"])

    def __len__(self) -> int:
        """Number of vectors at each site."""
        return len(self._index)

    def frame(self, position: Positions = "", site: Site = "") -> pd.DataFrame:
        """What the vectors are, one row each, by query and token. See the module for the columns.

        Args:
            position: only rows of this choice. site: only rows that mean something at this site (encoders have none
                where a query has no such media); with both, the rows are those of `tensor`.

        Raises:
            InputError: a position or site that was not collected.
        """
        rows = self._index
        if position:
            self._known("position", position, self.positions)
            rows = rows[rows["position"] == position]
        if site != "":
            self._known("site", str(site), self.sites)
            modality = ENCODERS.get(str(site))
            rows = rows[rows[f"{modality}_tokens"] > 0] if modality else rows
        if not len(rows):
            return rows
        return rows.sort_values(["position", "order", "at"], kind="stable").reset_index(drop=True)

    def tensor(self, site: Site, position: Positions) -> Tensor:
        """The vectors at a site and choice of positions, in the order of `frame(position, site)`.

        Returns:
            [row, d_model], or [row, head, d_head], in the stored dtype, on the CPU. Of the mapped shards only these
            rows are read.

        Raises:
            InputError: a position or site that was not collected.
        """
        rows = self.frame(position, site)
        if not len(rows):
            return torch.empty(0)
        pieces, places = [], []
        for shard, part in rows.groupby("shard", sort=False):
            pieces.append(shard_tensor(self.root, int(shard), str(site))[torch.tensor(part["row"].to_list())])
            places.append(torch.tensor(part.index.to_list()))
        found = torch.cat(pieces)
        return found[torch.argsort(torch.cat(places))]

    def activations(self, position: Positions, sites: Sequence[Site] = ()) -> Activations:
        """One vector a query in memory, for the probes: residual-stream and similar sites, float32, heads side by side.

        Raises:
            InputError: a choice with several vectors a query, an encoder's site, or what was not collected.
        """
        rows = self.frame(position)
        if rows["order"].duplicated().any():
            raise InputError(f"position '{position}' has several vectors a query; use tensor and frame")
        names = [str(site) for site in sites] or [site for site in self.sites if site not in ENCODERS]
        if set(names) & set(ENCODERS):
            raise InputError("an encoder's site lacks queries without its media; use tensor and frame")
        states = {name: self.tensor(name, position).flatten(1).to(torch.float32).numpy() for name in names}
        return Activations(states, rows[[*INDEX_COLUMNS, "length"]], position)

    @classmethod
    def _begin(cls, root: Path, omni: Omni, plan: Plan, dtype: torch.dtype) -> ActivationStore:
        about = {
            "fingerprint": fingerprint(omni),
            "source": omni.source,
            "sites": [str(site) for site in plan.sites],
            "positions": list(plan.positions),
            "dtype": str(dtype).removeprefix("torch."),
        }
        if not (root / "store.json").exists():
            check_folder(root)
            write_about(root, about)
        store = cls.open(root, omni)
        for key in ("sites", "positions", "dtype"):
            if store._about[key] != about[key]:
                found, wanted = store._about[key], about[key]
                raise InputError(
                    f"{root} was begun with {key} {found}, not {wanted}: ask for the same, or another folder"
                )
        return store

    def _missing(self, queries: Sequence[Query]) -> list[int]:
        # Attacks keep a query's id, so only id and content together say which query it is.
        index = self._index
        known = set(zip(index["query_id"], index["digest"], strict=True)) if len(index) else set()
        seen: set[tuple[str, str]] = set()
        missing = []
        for place, (query, digest) in enumerate(zip(queries, query_digests(queries), strict=True)):
            key = (query.id, digest)
            if key in seen:
                raise InputError(f"query {query.id} comes twice with the same content; give each query once")
            seen.add(key)
            if key not in known:
                missing.append(place)
        return missing

    def _known(self, what: str, name: str, names: Sequence[str]) -> None:
        if name not in names:
            raise InputError(f"no {what} '{name}' in {self.root}; collected were {', '.join(names)}")


class _Part:
    """The rows that are not on disk yet; written when they reach a size."""

    def __init__(self, store: ActivationStore, queries: Sequence[Query], limit: int) -> None:
        self._store, self._limit = store, limit
        self._dtype: torch.dtype = getattr(torch, store._about["dtype"])
        index = store._index
        self._number, first = next_number(store.root), 1 + int(index["order"].max()) if len(index) else 0
        known = pd.DataFrame([known_of(query) for query in queries], columns=list(INDEX_COLUMNS), dtype=object)
        self._known = {name: known[name].to_numpy() for name in INDEX_COLUMNS}
        self._known |= {"order": first + np.arange(len(queries)), "digest": query_digests(queries)}
        self._clear()

    def add(self, group: Sequence[int], batch: OmniBatch, cuts: list[Cut], states: dict[Site, list[Tensor]]) -> None:
        """Take the vectors of a batch, made of the queries at the places `group`."""
        places = np.asarray(group)
        for cut in cuts:
            columns = index_columns(batch, cut)
            chosen = places[columns["row"]]
            for name, column in ({name: known[chosen] for name, known in self._known.items()} | columns).items():
                self._columns.setdefault(name, []).append(column)
        for site, found in states.items():
            kept = [state.to("cpu", self._dtype) for state in found]
            self._states.setdefault(str(site), []).extend(kept)
            self._bytes += sum(state.nbytes for state in kept)
        if self._bytes >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        if columns and len(columns["row"]):
            # Rows of one position together, so that reading one choice touches one stretch of the file.
            order = np.argsort(columns["position"].astype(str), kind="stable")
            rows = pd.DataFrame({name: column[order] for name, column in columns.items()})
            rows["shard"], rows["row"] = self._number, np.arange(len(rows))
            states = {site: torch.cat(found)[torch.tensor(order)] for site, found in self._states.items()}
            write_part(self._store.root, self._number, states, rows)
            self._number += 1
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, list[np.ndarray]] = {}
        self._states: dict[str, list[Tensor]] = {}
        self._bytes = 0


def collect(
    omni: Omni,
    queries: Sequence[Query],
    sites: Sequence[Site] | None = None,
    positions: Positions = "mean",
    batch_size: int = 32,
    progress: bool = False,
) -> Activations:
    """One vector a query, in memory, in the queries' order: what `ActivationStore` keeps on disk.

    Args:
        omni: the model; whatever is attached to it (LoRA) takes part.
        queries: any mixture of text, image and audio. A prefill is left out: states are those before the reply.
        sites: where to read, no encoder; default every block's output and the final norm's.
        positions: `last` or a mean. A query without such positions gets zeros.
        batch_size: queries in one forward.
        progress: whether to draw a bar.

    Raises:
        InputError: positions that are several a query, an unknown site, or a query that cannot be encoded.
        RunError: states that are not finite.
    """
    from tqdm import tqdm

    plan = Plan.of(omni, sites, positions)
    if (positions != "last" and not positions.startswith("mean")) or set(plan.sites) & set(ENCODERS):
        raise InputError("collect keeps one vector a query, and no encoder's; for more use ActivationStore.collect")
    arrays: dict[str, np.ndarray] = {}
    lengths = np.zeros(len(queries), dtype=int)
    with tqdm(total=len(queries), disable=not progress, desc="activations", unit="query") as bar:
        for group, batch, (cut,), states in plan.run(queries, omni, batch_size, range(len(queries))):
            rows = np.array(group)[cut.row.cpu().numpy()]
            lengths[group] = prompt_lengths(batch)
            for site, (state,) in states.items():
                found = state.flatten(1).to(torch.float32).cpu().numpy()
                arrays.setdefault(str(site), np.zeros((len(queries), found.shape[1]), np.float32))[rows] = found
            bar.update(len(group))
    index = pd.DataFrame([known_of(query) for query in queries], columns=list(INDEX_COLUMNS)).assign(length=lengths)
    return Activations(arrays, index, positions)
