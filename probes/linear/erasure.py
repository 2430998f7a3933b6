"""LEACE: the smallest affine change of states after which no linear probe tells the classes apart.

"LEACE: Perfect linear concept erasure in closed form" (arXiv 2306.03819), theorem 4.3. With S the covariance of the
states, c their covariance with the label, W = S^(-1/2) and u = W c / |W c|, the erased state is
x - W⁺ u uᵀ W (x - mean). A difference in means that is projected out leaves the classes apart wherever states vary
unequally; LEACE leaves nothing that is linear, and moves the states as little as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casa_mech.errors import InputError
from casa_mech.queries.labels import label_of


@dataclass(frozen=True)
class Erasure:
    """A fitted LEACE eraser, which applies itself: x - (x - mean) · reads · writes."""

    mean: np.ndarray
    """float64 [d_model]: of the states that it was fitted on."""
    reads: np.ndarray
    """float64 [d_model]: W u, what is read off a centred state."""
    writes: np.ndarray
    """float64 [d_model]: W⁺ u, what is taken away for it."""

    def __call__(self, states: np.ndarray | Tensor) -> Any:
        """`states` [..., d_model] without what is linear in the label; a tensor in its own dtype and device.

        As an edit of a site (`casa_mech.trace.standing.standing_edits`) it erases in the model.
        """
        if isinstance(states, Tensor):
            mean, reads, writes = (
                torch.as_tensor(part, dtype=states.dtype, device=states.device)
                for part in (self.mean, self.reads, self.writes)
            )
            return states - ((states - mean) @ reads).unsqueeze(-1) * writes
        return states - ((states - self.mean) @ self.reads)[..., None] * self.writes


def fit_erasure(states: np.ndarray, labels: Sequence[Any] | np.ndarray) -> Erasure:
    """The LEACE eraser of `labels` [row] (by any of their names) from `states` [row, d_model].

    Directions in which the states do not vary are left as they are. On the states it is fitted on both classes have one
    mean afterwards; on others as far as means and covariance are theirs, too.

    Raises:
        InputError: other shapes, a row without a label, one class only, or states that are not finite.
    """
    values = np.asarray(states, dtype=np.float64)
    names = [label_of(label) for label in labels]
    if values.ndim != 2 or len(values) != len(names):
        raise InputError(f"states {list(values.shape)} and {len(names)} labels: give [row, d_model] and [row]")
    if not np.isfinite(values).all():
        raise InputError("some states are not finite: collect them again in float32, or leave them out")
    if set(names) != {"harmful", "benign"}:
        raise InputError("an erasure needs labelled rows of both classes, harmful and benign")
    harmful = np.array([name == "harmful" for name in names], dtype=np.float64)
    mean = values.mean(axis=0)
    centred = values - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(values))
    varying = variances > variances[-1] * len(variances) * np.finfo(np.float64).eps
    root, axes = np.sqrt(variances[varying]), axes[:, varying]
    whitened = (axes.T @ (centred.T @ (harmful - harmful.mean()))) / root
    length = np.linalg.norm(whitened)
    unit = whitened / length if length > 0 else whitened
    return Erasure(mean, axes @ (unit / root), axes @ (unit * root))
