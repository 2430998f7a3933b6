"""Numbers that must be finite: weights as they are read, and what a token or a verdict is chosen from.

NaN compares as false, so a decision that asks "above the threshold?" would find everything safe, and `argmax` would
take it for the largest number. It is refused instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from casa_mech.errors import ModelError
from casa_mech.queries import Query


def is_finite(values: Tensor) -> bool:
    """True if no value is NaN or infinite; one pass over `values`, without a mask of their size."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:  # eight-bit floats have no extremes in torch
        values = values.to(torch.float32)
    # Both extremes are NaN if any value is.
    return all(bool(torch.isfinite(extreme)) for extreme in values.detach().aminmax())


def check_weights(tensors: Mapping[str, Tensor], source: Path | str, way_out: str) -> None:
    """Refuse weights that hold NaN or an infinite number; the error names `source` and the tensor.

    Raises:
        ModelError: there is such a tensor; the message ends in `way_out`.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ModelError(f"{source}: the tensor {name} holds NaN or infinite numbers; {way_out}")


def check_decision(what: str, values: Tensor, queries: Sequence[Query]) -> None:
    """Refuse numbers [query] or [query, ...] that nothing can be decided from; the error names the first such query.

    Raises:
        ModelError: a number is NaN or infinite.
    """
    if is_finite(values):
        return
    row = next(index for index, value in enumerate(values) if not is_finite(value))
    raise ModelError(
        f"query {queries[row].id}: {what} is NaN or infinite, so nothing can be decided from it; check the weights, or "
        "load the model with dtype float32"
    )


class _FiniteLogits(LogitsProcessor):
    def __init__(self, queries: Sequence[Query]) -> None:
        self._queries = queries

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_decision("a logit of the reply", scores, self._queries)
        return scores


def finite_logits(queries: Sequence[Query]) -> LogitsProcessorList:
    """For `model.generate`: stops with a `ModelError` at logits that are not finite; a row for each of `queries`."""
    return LogitsProcessorList([_FiniteLogits(queries)])
