"""Hidden states in memory: one vector for each query and site, with what is known of the queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from casa_mech.display import table_html
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.progress import progress_bar
from casa_mech.queries import Prompt
from casa_mech.queries.labels import label_of
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
    number of tokens. Columns that are left out are put in: `query_id` by the row's number, `topic` as `query_id`, the
    others empty; labels are read by any of their names (`casa_mech.queries.labels.label_of`)."""
    positions: str = ""
    """Which positions were read (`casa_mech.trace.capture.Positions`); "" where that is not known."""

    def __post_init__(self) -> None:
        """Complete the index.

        Raises:
            InputError: states of another number of rows than the index has, or a label that is none.
        """
        index = self.index.reset_index(drop=True)
        for site, array in self.states.items():
            if array.ndim != 2 or len(array) != len(index):
                rows = f"the index's {len(index)} rows"
                raise InputError(f"states at '{site}' are {list(array.shape)}: give [query, d_model] with {rows}")
        if "query_id" not in index:
            index["query_id"] = [f"row-{number}" for number in range(len(index))]
        for column in INDEX_COLUMNS:
            if column not in index:
                index[column] = index["query_id"] if column == "topic" else ""
        if not index["label"].isin(("harmful", "benign", "")).all():
            index["label"] = [label_of(value) or "" for value in index["label"]]
        object.__setattr__(self, "index", index)

    @classmethod
    def from_arrays(
        cls,
        X: np.ndarray | Mapping[str, np.ndarray],
        y: Sequence[Any] | np.ndarray,
        groups: Sequence[Any] | np.ndarray | None = None,
        positions: str = "",
    ) -> Activations:
        """States that were collected elsewhere, with their labels.

        Args:
            X: [query, d_model], [site, query, d_model] (sites are then named "0", "1", ...), or by site [query,
                d_model].
            y: [query], labels by any of their names; 1 is harmful.
            groups: [query], what is one draw, as in scikit-learn; None: each query is its own.
            positions: which positions they are of.

        Raises:
            InputError: lengths that differ, or a label that is none.
        """
        if isinstance(X, Mapping):
            states = {str(site): np.asarray(array) for site, array in X.items()}
        else:
            stacked = np.asarray(X)
            states = {str(site): array for site, array in enumerate(stacked if stacked.ndim == 3 else stacked[None])}
        index = pd.DataFrame({"label": pd.Series(list(y), dtype=object)})
        if groups is not None:
            if len(groups) != len(index):
                raise InputError(f"{len(index)} labels but {len(groups)} groups: give one group a query")
            index["topic"] = [str(group) for group in groups]
        return cls({site: array.astype(np.float32) for site, array in states.items()}, index, positions)

    def __repr__(self) -> str:
        n_harmful = int(self.harmful.sum())
        widths = " or ".join(str(width) for width in sorted({array.shape[1] for array in self.states.values()}))
        return (
            f"Activations of {len(self.index)} prompts ({n_harmful} harmful, {len(self.index) - n_harmful} others) at "
            f"{len(self.states)} sites ({', '.join(self.states)}), width {widths}, "
            f"positions {self.positions or 'unknown'}"
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
    queries: Sequence[Prompt],
    sites: Sequence[Site] | None = None,
    positions: Positions = "mean",
    batch_size: int = 32,
    progress: bool | None = None,
) -> Activations:
    """One vector for each query and site, in the queries' order; `ActivationStore` keeps more of them, on disk.

    Args:
        omni: the model; whatever is attached to it (LoRA) takes part.
        queries: texts, and any mixture of text, image and audio. A prefill is left out: states are those before the
            reply.
        sites: where to read, no encoder; default every block's output and the final norm's.
        positions: `last`, `last:user` or a mean. A query without such positions gets zeros.
        batch_size: queries in one forward.
        progress: whether to draw a bar; None: where a person watches.

    Raises:
        InputError: positions that are several a query, an unknown site, or a query that cannot be encoded.
        RunError: states that are not finite.
    """
    plan = ReadingPlan.of(omni, sites, positions)
    if not one_a_query(positions) or set(plan.sites) & set(ENCODERS):
        raise InputError("collect keeps one vector a query, and no encoder's; for more use ActivationStore.collect")
    members = omni.queries(queries)
    arrays: dict[str, np.ndarray] = {}
    lengths = np.zeros(len(members), dtype=int)
    with progress_bar(len(members), "activations", progress) as bar:
        for group, batch, (cut,), states in plan.run(members, omni, batch_size, range(len(members))):
            rows = np.array(group)[cut.row.cpu().numpy()]
            lengths[group] = prompt_lengths(batch)
            for site, (state,) in states.items():
                vectors = state.flatten(1).to(torch.float32).cpu().numpy()
                arrays.setdefault(str(site), np.zeros((len(members), vectors.shape[1]), np.float32))[rows] = vectors
            bar.update(len(group))
    index = pd.DataFrame([query_columns(query) for query in members], columns=list(INDEX_COLUMNS))
    return Activations(arrays, index.assign(length=lengths), positions)


def collect_tokens(
    omni: Omni,
    queries: Sequence[Prompt],
    sites: Sequence[Site],
    positions: Positions = "prompt",
    batch_size: int = 32,
    progress: bool | None = None,
) -> dict[str, list[np.ndarray]]:
    """For each site the states of each query's tokens, float32 [token, d_model], in memory.

    Args:
        omni: the model; whatever is attached to it (LoRA) takes part.
        queries: texts or queries; a prefill is left out.
        sites: where to read, no encoder.
        positions: which tokens: those that "mean" is over, all, or every few.
        batch_size, progress: as for `collect`.

    Raises:
        InputError, RunError: as `collect`.
    """
    plan = ReadingPlan.of(omni, sites, positions)
    if one_a_query(positions) or set(plan.sites) & set(ENCODERS):
        raise InputError("tokens are read at positions that are several a query (prompt, all, every:<n>), no encoder's")
    members = omni.queries(queries)
    tokens: dict[str, list[np.ndarray]] = {str(site): [np.zeros((0, 0))] * len(members) for site in plan.sites}
    with progress_bar(len(members), "tokens", progress) as bar:
        for group, _, (cut,), states in plan.run(members, omni, batch_size, range(len(members))):
            row = cut.row.cpu().numpy()
            for site, (state,) in states.items():
                vectors = state.flatten(1).to(torch.float32).cpu().numpy()
                for place, query in enumerate(group):
                    tokens[str(site)][query] = vectors[row == place]
            bar.update(len(group))
    return tokens
