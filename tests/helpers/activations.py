"""Activations from arrays, for tests whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from probes.activations import Activations
from probes.activations.index import INDEX_COLUMNS


def activations(
    states: Mapping[str, np.ndarray],
    harmful: Sequence[bool] | np.ndarray,
    topics: Sequence[str] | np.ndarray,
    kinds: Sequence[str] | np.ndarray = (),
    site: str = "norm",
) -> Activations:
    """The same requests on several surfaces: for each its states [request, d_model]."""
    frames = []
    for surface in states:
        frame = pd.DataFrame(dict.fromkeys(INDEX_COLUMNS, ""), index=range(len(topics)))
        frame["query_id"] = [f"q{number}" for number in range(len(topics))]
        frame["label"] = np.where(harmful, "harmful", "benign")
        frame["topic"], frame["surface"] = list(topics), surface
        if len(kinds):
            frame["category"] = list(kinds)
        frames.append(frame)
    joined = np.concatenate([states[surface] for surface in states]).astype(np.float32)
    return Activations({site: joined}, pd.concat(frames, ignore_index=True), "last")
