"""Hidden states in memory: one vector for each query and site, with what is known of the queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from casa_mech.display import table_html
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.capture import Positions, one_a_query
from casa_mech.trace.sites import ENCODERS, Site
from probes.activations.forward import ReadingPlan
from probes.activations.index import INDEX_COLUMNS, prompt_lengths, query_columns


@dataclass(frozen=True)
class Activations:
    """One vector for each query and site, in memory, and the queries they belong to."""

    states: dict[str, np.ndarray]
    """For each site, in the order in which the model runs them, float32 [query, d_model]."""
    index: pd.DataFrame
    """One row a query: `INDEX_COLUMNS` (empty string where the query's maker said nothing) and `length`, the prompt's
    number of tokens."""
    positions: str
    """Which positions were read (`casa_mech.trace.capture.Positions`)."""

    def __repr__(self) -> str:
        n_harmful = int(self.harmful.sum())
        widths = " or ".join(str(width) for width in sorted({array.shape[1] for array in self.states.values()}))
        return (
            f"Activations of {len(self.index)} prompts ({n_harmful} harmful, {len(self.index) - n_harmful} others) at "
            f"{len(self.states)} sites ({', '.join(self.states)}), width {widths}, positions {self.positions}"
        )

    def _repr_html_(self) -> str:
        columns = [name for name in ("attack", "surface", "label") if name in self.index]
        counts = self.index.groupby(columns, sort=False).size().rename("prompts").reset_index()
        return table_html(counts, repr(self), index=False)

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
        """str [query]: what each query is one draw with (`casa_mech.judging.stats.cluster_of`); folds keep it whole."""
        return self.index["topic"].to_numpy(dtype=str)

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


def collect(
    omni: Omni,
    queries: Sequence[Query],
    sites: Sequence[Site] | None = None,
    positions: Positions = "mean",
    batch_size: int = 32,
    progress: bool = False,
) -> Activations:
    """One vector for each query and site, in the queries' order; `ActivationStore` keeps more of them, on disk.

    Args:
        omni: the model; whatever is attached to it (LoRA) takes part.
        queries: any mixture of text, image and audio. A prefill is left out: states are those before the reply.
        sites: where to read, no encoder; default every block's output and the final norm's.
        positions: `last`, `last:user` or a mean. A query without such positions gets zeros.
        batch_size: queries in one forward.
        progress: whether to draw a bar.

    Raises:
        InputError: positions that are several a query, an unknown site, or a query that cannot be encoded.
        RunError: states that are not finite.
    """
    plan = ReadingPlan.of(omni, sites, positions)
    if not one_a_query(positions) or set(plan.sites) & set(ENCODERS):
        raise InputError("collect keeps one vector a query, and no encoder's; for more use ActivationStore.collect")
    arrays: dict[str, np.ndarray] = {}
    lengths = np.zeros(len(queries), dtype=int)
    with tqdm(total=len(queries), disable=not progress, desc="activations", unit="query") as bar:
        for group, batch, (cut,), states in plan.run(queries, omni, batch_size, range(len(queries))):
            rows = np.array(group)[cut.row.cpu().numpy()]
            lengths[group] = prompt_lengths(batch)
            for site, (state,) in states.items():
                vectors = state.flatten(1).to(torch.float32).cpu().numpy()
                arrays.setdefault(str(site), np.zeros((len(queries), vectors.shape[1]), np.float32))[rows] = vectors
            bar.update(len(group))
    index = pd.DataFrame([query_columns(query) for query in queries], columns=list(INDEX_COLUMNS))
    return Activations(arrays, index.assign(length=lengths), positions)
