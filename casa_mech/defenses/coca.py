"""CoCA: decode from logits in which a safety principle weighs more (arXiv 2409.11365; docs/method.md §4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from casa_mech.defenses.base import Defense, DefenseSettings, Description
from casa_mech.defenses.prompts import defense_text, with_text_before
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply
from casa_mech.trace.contrast import Sampling, decode_branches, pick, reworded_branches

Base = Literal["principle", "original"]


class CocaSettings(DefenseSettings):
    """Options of CoCA."""

    alpha: float = Field(4.0, ge=-1, allow_inf_nan=False)
    """How much of the principle's difference is added to the base term; 4 as in the public port of the method."""
    base: Base = "principle"
    """The base term: the logits with the principle (the port) or without it (the paper's wording)."""
    principle: str | None = None
    """The text before the question; None for the package's own, in words that the model's tokenizer knows."""


class Coca(Defense):
    """Constitutional calibration: two branches that are given the same tokens, one of them with the principle.

    At every step z = z_base + alpha (z_principle - z_original). Both branches are rows of one batch and keep their
    caches. The reply is greedy or sampled as the generation settings say, from z.
    """

    name = "coca"

    def __init__(self, omni: Omni, settings: CocaSettings = CocaSettings()) -> None:
        super().__init__(omni)
        self.settings = settings
        self.principle = defense_text(omni, "principle") if settings.principle is None else settings.principle

    def describe(self) -> Description:
        """Prompt and logits; two forwards a token, in one batch."""
        return Description(
            name=self.name,
            changes=("prompt", "logits"),
            forwards_per_token=2.0,
            source="arXiv 2409.11365; alpha and base as in OmniSafeBench-MM",
            safety_prompt=self.safety_prompt,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """As of every defence, with the principle as it is worded for this model."""
        return super().identity | {"principle": self.principle}

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        with_principle = [with_text_before(query, self.principle) for query in queries]
        alpha, base = self.settings.alpha, self.settings.base

        def decode(group: list[int]) -> list[list[int]]:
            members = [queries[index] for index in group]
            branches = reworded_branches(self.omni, members, [with_principle[index] for index in group])
            sampling = Sampling.of(settings, len(group), self.omni.device)

            def choose(_: int, original: Tensor, principled: Tensor) -> Tensor:
                return pick(calibrated(principled, original, alpha, base), sampling)

            return decode_branches(self.omni, branches, choose, settings.max_new_tokens).new.tolist()

        return self.omni.decoded(queries, settings, decode, self.name, progress)


def calibrated(principled: Tensor, original: Tensor, alpha: float, base: Base = "principle") -> Tensor:
    """Logits [row, vocab] to decode from: base + alpha (principled - original).

    The two bases are one family, since z_p + alpha D = z_o + (1 + alpha) D; with base "original" and alpha 1, or with
    base "principle" and alpha 0, they are exactly `principled`.
    """
    if base == "original":
        alpha -= 1
    return principled + alpha * (principled - original) if alpha else principled
