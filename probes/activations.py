"""Hidden states of many queries at many sites, with what is known of each query, kept as safetensors and parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from casa_mech.errors import InputError, RunError
from casa_mech.files import writing_folder
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.capture import Positions, capture
from casa_mech.trace.sites import Site

INDEX_COLUMNS = ("query_id", "label", "surface", "attack", "topic", "category", "split")
_STATES, _INDEX = "states.safetensors", "index.parquet"


@dataclass(frozen=True)
class Activations:
    """Hidden states and the queries they belong to.

    states: for each site, in the order in which the model runs them, float32 [query, d_model].
    index: one row a query, with `INDEX_COLUMNS` (empty string where the query's maker said nothing).
    positions: which positions were read (see `casa_mech.trace.capture`).
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
        """str [query]: each query's topic, the cluster that folds and intervals respect."""
        return self.index["topic"].to_numpy(dtype=str)

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

    def save(self, folder: Path | str) -> None:
        """Write `states.safetensors` and `index.parquet` into `folder`, whole or not at all."""
        with writing_folder(folder) as temporary:
            metadata = {"positions": self.positions, "sites": " ".join(self.sites)}
            save_file(self.states, temporary / _STATES, metadata=metadata)
            self.index.to_parquet(temporary / _INDEX)

    @classmethod
    def load(cls, folder: Path | str) -> Activations:
        """Read what `save` wrote.

        Raises:
            RunError: files that are missing or do not belong together.
        """
        folder = Path(folder)
        try:
            with safe_open(folder / _STATES, framework="numpy") as stored:
                metadata = stored.metadata()
                states = {site: stored.get_tensor(site) for site in metadata["sites"].split()}
            index = pd.read_parquet(folder / _INDEX)
        except Exception as error:
            raise RunError(f"{folder}: unreadable as activations ({error}); delete it, and it is made again") from None
        if any(len(array) != len(index) for array in states.values()):
            raise RunError(f"{folder}: states and index differ in length; delete the folder, it is made again")
        return cls(states, index, metadata["positions"])


def collect(
    omni: Omni,
    queries: Sequence[Query],
    sites: Sequence[Site] | None = None,
    positions: Positions = "mean",
    batch_size: int = 32,
    progress: bool = False,
) -> Activations:
    """Hidden states of `queries`, in their order.

    Args:
        omni: the model; whatever is attached to it (LoRA) takes part.
        queries: any mixture of text, image and audio. A prefill is left out: states are those before the reply.
        sites: where to read; default every block's output and the final norm's.
        positions: which positions; one vector a query, so not `"all"`.
        batch_size: queries in one forward.
        progress: whether to draw a bar.

    Raises:
        InputError: `positions="all"`, an unknown site, or a query that cannot be encoded.
    """
    from tqdm import tqdm

    if positions == "all":
        raise InputError("collect keeps one vector a query; for every position call casa_mech.trace.capture")
    wanted: list[Site] = list(sites) if sites is not None else [*range(omni.n_layers), "norm"]
    rows: dict[str, np.ndarray] = {}
    with tqdm(total=len(queries), disable=not progress, desc="activations", unit="query") as bar:
        for group in omni.batches(queries, batch_size):
            batch = omni.encode([queries[index] for index in group], prefill=False)
            for site, states in capture(omni, batch, wanted, positions).items():
                array = states.to(torch.float32).cpu().numpy()
                rows.setdefault(str(site), np.empty((len(queries), array.shape[1]), np.float32))[group] = array
            bar.update(len(group))
    return Activations(rows, _index(queries), positions)


def _index(queries: Sequence[Query]) -> pd.DataFrame:
    known = INDEX_COLUMNS[2:]
    records = [
        {"query_id": query.id, "label": query.label or "", **{key: query.meta.get(key, "") for key in known}}
        for query in queries
    ]
    return pd.DataFrame(records, columns=list(INDEX_COLUMNS))
