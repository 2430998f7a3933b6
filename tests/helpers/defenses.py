"""What the tests of trained defences share: a small training set, and weights moved off their start."""

from __future__ import annotations

import torch
from torch import Tensor

from casa_mech.defenses import Defense
from casa_mech.defenses.safety_token import SafetyTokenDefense
from casa_mech.defenses.trained import Tuned
from casa_mech.omni import Omni
from casa_mech.queries import Example, Query


def examples(n: int = 16) -> list[Example]:
    rows = []
    for index in range(n):
        harmful, word = index % 2 == 0, "bomb" if index % 2 == 0 else "cake"
        answer = f"sure , here is how to make a {word} ."
        query = Query.from_text(
            f"{'please ' * (index % 3)}how do i make a {word} ?", id=f"e{index}",
            label="harmful" if harmful else "benign", meta={"compliance": answer},
        )  # fmt: skip
        rows.append(Example(query=query, reply="sorry , can not help with that ." if harmful else answer))
    return rows


def stir(defense: Defense, scale: float = 0.1) -> None:
    """Move what is trained off its start."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(defense, SafetyTokenDefense):
        parameters = [value for group in defense.casa.parts.groups() for value in group.values()]
    else:
        assert isinstance(defense, Tuned) and defense.adapter is not None
        parameters = list(defense.adapter.parameters().values())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    if isinstance(defense, SafetyTokenDefense):
        defense.casa.parts.tokens.write()


def logits_of(omni: Omni, queries: list[Query]) -> Tensor:
    with torch.no_grad():
        return omni.model(**omni.encode(queries).inputs).logits[:, -1]
