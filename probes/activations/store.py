"""Hidden states on disk: many queries, sites and positions, collected once, readable without this package.

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
  vector is zero and stands for nothing); `shard` and `row`;
* `queries.parquet`: `query_id`, `digest` and `order` of every query that was asked for, written before the first of
  them is read, so that a run which is stopped and continued numbers them as one that is not.

Rows of one position are consecutive in a shard. Shards are written whole and mapped into memory when read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from casa_mech.progress import progress_bar
from casa_mech.queries import Prompt, Query
from casa_mech.trace.capture import Cut, Positions
from casa_mech.trace.sites import ENCODERS, Site
from probes.activations.forward import ReadingPlan, fingerprint, query_digests
from probes.activations.index import INDEX_COLUMNS, query_columns, vector_columns
from probes.activations.memory import Activations
from probes.activations.shards import (
    next_shard,
    read_about,
    read_index,
    read_orders,
    shard_tensor,
    write_about,
    write_orders,
    write_shard,
)


class ActivationStore:
    """Activations on disk. Make one with `ActivationStore.collect`, open one with `ActivationStore.open`."""

    def __init__(self, root: Path, about: Mapping[str, Any], index: pd.DataFrame) -> None:
        """For `open`: the folder, the content of `store.json`, and the rows of all shards."""
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
        queries: Sequence[Prompt],
        sites: Sequence[Site] | None = None,
        positions: Sequence[Positions] | Positions = ("last",),
        out: Path | str = "activations",
        *,
        replies: Sequence[Sequence[int]] | None = None,
        prefill: bool = False,
        batch_size: int = 32,
        shard_mb: int = 256,
        dtype: torch.dtype | None = None,
        progress: bool | None = None,
    ) -> ActivationStore:
        """Hidden states of `queries`, added to the store `out`; queries that it holds already are passed over.

        One forward a batch serves all sites and positions and stops after the deepest site. A run that was stopped is
        continued by the same call, from the last whole shard.

        Args:
            omni: the model; whatever is attached to it (LoRA) takes part and is part of its fingerprint.
            queries: texts, and any mixture of text, image and audio; id and content together tell them apart, so one
                whose picture or clip has changed since is another query, and its states stand beside the earlier ones.
            sites: where to read (`casa_mech.trace.sites.Site`); default every block's output and the final norm's.
            positions: one or several choices (`casa_mech.trace.capture.Positions`).
            out: the store's folder.
            replies: token ids of each query's reply, for `generated:<k>`; default the model's own greedy reply.
            prefill: whether the queries' assistant prefill is read too.
            batch_size: queries in one forward.
            shard_mb: mebibytes at which a shard is closed; about that much is held in memory.
            dtype: of what is stored; default the model's own.
            progress: whether to draw a bar; None: where a person watches.

        Raises:
            InputError: an unknown site or position, a query that comes twice or cannot be encoded, or a store that was
                begun with other sites or positions.
            RunError: the store is another model's or damaged; states that are not finite; the disk is full.
        """
        plan = ReadingPlan.of(omni, sites, positions, replies, prefill)
        store = cls._begin(Path(out), omni, plan, dtype or omni.dtype)
        members = omni.queries(queries)
        digests = query_digests(members)
        missing, orders = store._missing(members, digests), store._orders(members, digests)
        known = {"order": np.asarray(orders), "digest": digests}
        writer = _ShardWriter(store, members, known, shard_mb * 2**20)
        held = len(members) - len(missing)
        with progress_bar(len(members), "activations", progress, initial=held) as bar:
            queue = [members[place] for place in missing]
            for group, batch, cuts, states in plan.run(queue, omni, batch_size, missing):
                writer.add(group, batch, cuts, states)
                bar.update(len(group))
        writer.flush()
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
        """The index, one row a vector, by query and token; the module lists its columns.

        Args:
            position: only rows of this choice.
            site: only rows that mean something at this site (encoders have none where a query has no such media); with
                both, the rows are those of `tensor`.

        Raises:
            InputError: a position or site that was not collected.
        """
        rows = self._index
        if position:
            self._check("position", position, self.positions)
            rows = rows[rows["position"] == position]
        if site != "":
            self._check("site", str(site), self.sites)
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
        vectors, places = [], []
        for shard, members in rows.groupby("shard", sort=False):
            vectors.append(shard_tensor(self.root, int(shard), str(site))[torch.tensor(members["row"].to_list())])
            places.append(torch.tensor(members.index.to_list()))
        return torch.cat(vectors)[torch.argsort(torch.cat(places))]

    def activations(self, position: Positions, sites: Sequence[Site] = ()) -> Activations:
        """One vector for each query and site in memory, as the probes take them: float32, heads side by side.

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
    def _begin(cls, root: Path, omni: Omni, plan: ReadingPlan, dtype: torch.dtype) -> ActivationStore:
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
                raise InputError(
                    f"{root} was begun with {key} {store._about[key]}, not {about[key]}: ask for the same, or another "
                    "folder"
                )
        return store

    def _missing(self, queries: Sequence[Query], digests: np.ndarray) -> list[int]:
        # Attacks keep a query's id, so only id and content together say which query it is.
        index = self._index
        stored = set(zip(index["query_id"], index["digest"], strict=True)) if len(index) else set()
        seen: set[tuple[str, str]] = set()
        missing = []
        for place, (query, digest) in enumerate(zip(queries, digests, strict=True)):
            key = (query.id, digest)
            if key in seen:
                raise InputError(f"query {query.id} comes twice with the same content; give each query once")
            seen.add(key)
            if key not in stored:
                missing.append(place)
        return missing

    def _orders(self, queries: Sequence[Query], digests: np.ndarray) -> list[int]:
        """The place in the store of each query; new ones follow those that were asked for before, in their order."""
        keys = list(zip((query.id for query in queries), digests, strict=True))
        order_of = read_orders(self.root, self._index)
        first = 1 + max(order_of.values(), default=-1)
        new = [key for key in keys if key not in order_of]
        if new:
            order_of |= dict(zip(new, range(first, first + len(new)), strict=True))
            write_orders(self.root, order_of)
        return [order_of[key] for key in keys]

    def _check(self, kind: str, name: str, names: Sequence[str]) -> None:
        if name not in names:
            raise InputError(f"no {kind} '{name}' in {self.root}; collected were {', '.join(names)}")


class _ShardWriter:
    """The vectors that are not on disk yet; written as a shard when they reach a size."""

    def __init__(
        self, store: ActivationStore, queries: Sequence[Query], known: Mapping[str, np.ndarray], limit: int
    ) -> None:
        """For `queries`, whose places are what `add` is given; `known` are more columns of the index, a value each; a
        shard is closed at `limit` bytes."""
        self._store, self._limit = store, limit
        self._dtype: torch.dtype = getattr(torch, store._about["dtype"])
        self._number = next_shard(store.root)
        columns = pd.DataFrame([query_columns(query) for query in queries], columns=list(INDEX_COLUMNS), dtype=object)
        self._query_columns = {name: columns[name].to_numpy() for name in INDEX_COLUMNS}
        self._query_columns |= known
        self._clear()

    def add(self, group: Sequence[int], batch: OmniBatch, cuts: list[Cut], states: dict[Site, list[Tensor]]) -> None:
        """Take the vectors of a batch, made of the queries at the places `group`."""
        places = np.asarray(group)
        for cut in cuts:
            columns = vector_columns(batch, cut)
            queries = places[columns["row"]]
            columns = {name: values[queries] for name, values in self._query_columns.items()} | columns
            for name, column in columns.items():
                self._columns.setdefault(name, []).append(column)
        for site, by_cut in states.items():
            vectors = [state.to("cpu", self._dtype) for state in by_cut]
            self._states.setdefault(str(site), []).extend(vectors)
            self._bytes += sum(state.nbytes for state in vectors)
        if self._bytes >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        columns = {name: np.concatenate(pieces) for name, pieces in self._columns.items()}
        if columns and len(columns["row"]):
            # Rows of one position together, so that reading one choice touches one stretch of the file.
            order = np.argsort(columns["position"].astype(str), kind="stable")
            rows = pd.DataFrame({name: column[order] for name, column in columns.items()})
            rows["shard"], rows["row"] = self._number, np.arange(len(rows))
            states = {site: torch.cat(vectors)[torch.tensor(order)] for site, vectors in self._states.items()}
            write_shard(self._store.root, self._number, states, rows)
            self._number += 1
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, list[np.ndarray]] = {}
        self._states: dict[str, list[Tensor]] = {}
        self._bytes = 0
