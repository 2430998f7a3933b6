"""Refusal-direction ablation as an attack: a direction taken out of all weights that write to the residual stream.

Arditi et al. (arXiv 2406.11717, §2.4): with W' = (I - r rᵀ) W for every matrix that writes, no state ever has a part
along r. Whoever can change weights can take the gate off as well; the question here is whether disarming the model's
own refusal disarms the gate, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging import Judge
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.omni.architecture import part_at
from casa_mech.queries import Query
from casa_mech.whitebox.objective import Aim
from casa_mech.whitebox.results import AttackResult, Measured, measure


def ablate(
    casa: Casa,
    queries: Sequence[Query],
    directions: Tensor,
    judge: Judge | None = None,
    generation: GenerationSettings = GenerationSettings(),
    aim: Aim = "compliance",
    before: Sequence[Measured] | None = None,
) -> list[AttackResult]:
    """Give a model without `directions` each of `queries`; the model is as it was afterwards.

    Args:
        casa: the gate on its model.
        queries: any mixture.
        directions: [d_model] or [direction, d_model], of the residual stream; they need be neither unit nor orthogonal.
        judge: of the replies; the keyword judge, an upper bound, when not given.
        generation: how replies are generated.
        aim: what the directions are to remove: "compliance" (refusal; the gate is not known) or "v_s".
        before: the queries on the intact model, measured (see `measure`), where that was done already.

    Returns:
        Results with the queries as they are; budget: how many directions; steps: 0.

    Raises:
        InputError: no queries, or directions of another width, zero, not finite or dependent.
    """
    if not queries:
        raise InputError("there are no queries to attack: give at least one")
    before = before or measure(casa, queries, judge, generation)
    with ablated(casa.omni, directions) as count:
        after = measure(casa, queries, judge, generation)
    return [
        AttackResult(
            query=query, attack="ablation", aim=aim, budget=float(count), steps=0, seed=generation.seed,
            before=first, after=second, trajectory=(first.margin, second.margin),
        )
        for query, first, second in zip(queries, before, after, strict=True)
    ]  # fmt: skip


@contextmanager
def ablated(omni: Omni, directions: Tensor) -> Iterator[int]:
    """The model without `directions` ([d_model] or [direction, d_model]) in its residual stream, for a block.

    Changes embedding, both encoders' last layers, and each block's attention and MLP outputs, LoRA included; afterwards
    every weight is the tensor it was. Where embedding and head are one matrix, the head loses the directions as well.

    Yields:
        How many directions there are.

    Raises:
        InputError: directions of another width, zero, not finite or dependent.
    """
    basis = _basis(directions, omni.d_model).to(omni.device)
    intact: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter, rows in _writers(omni):
            intact.append((parameter, parameter.data))
            parameter.data = _without(parameter.data, basis, rows)
        yield len(basis)
    finally:
        for parameter, data in intact:
            parameter.data = data


def _writers(omni: Omni) -> Iterator[tuple[nn.Parameter, bool]]:
    """Weights that write to the residual stream; with True where rows (else columns, or a bias) are of its width."""
    yield omni.embedding.weight, True
    linears = [part_at(omni.tower(modality), tower.projection) for modality, tower in omni.architecture.towers.items()]
    for layer in range(omni.n_layers):
        linears += omni.writers(layer)
    for linear in linears:
        base = getattr(linear, "base_layer", linear)
        yield base.weight, False
        if base.bias is not None:
            yield base.bias, False
        for lora in getattr(linear, "lora_B", {}).values():
            yield lora.weight, False


def _without(weight: Tensor, basis: Tensor, rows: bool) -> Tensor:
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    ablated_weight = exact - (exact @ basis.T) @ basis if rows else exact - basis.T @ (basis @ exact)
    return ablated_weight.to(weight.dtype)


def _basis(directions: Tensor, d_model: int) -> Tensor:
    """An orthonormal basis [direction, d_model] of what `directions` span."""
    rows = directions.detach().to(torch.float64).reshape(-1, directions.shape[-1] if directions.ndim else 1)
    if rows.shape[1] != d_model:
        raise InputError(f"directions of width {rows.shape[1]} do not fit a model of width {d_model}")
    if not torch.isfinite(rows).all():
        raise InputError("directions hold NaN or infinite numbers: fit them again")
    if len(rows) == 0 or torch.linalg.matrix_rank(rows) < len(rows):
        raise InputError("directions are zero or depend on each other: give each once, and not zero")
    return torch.linalg.qr(rows.T).Q.T.to(torch.float32)
