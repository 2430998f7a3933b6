"""SafeCoDe: contrast with a noised picture, then push refusals up or down by a verdict (arXiv 2509.19212).

`mode="paper"` follows the description, `mode="code"` does what the released program does: it forces a refusal phrase
after an unsafe verdict, and samples at its own temperatures under its own caps (docs/method.md §2).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from casa_mech.defenses.base import Defense, Description
from casa_mech.defenses.media import need_image, noised
from casa_mech.defenses.prompts import refusal_phrases
from casa_mech.defenses.safecode_decoding import Guidance, SafeCodeSettings, modulated
from casa_mech.defenses.safecode_released import released
from casa_mech.defenses.verdict import CasaVerdict, ModelVerdict, VerdictOf
from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply
from casa_mech.trace.contrast import Branches, branched
from casa_mech.trace.fork import read_prompts, resumed


class SafeCode(Defense):
    """Safety-aware contrastive decoding.

    A verdict on the query, once; then for the first `steps` tokens two branches, the query and a copy with noise on its
    media, whose logits are contrasted and whose refusal tokens are pushed up (unsafe) or down (safe); then ordinary
    decoding from the first branch's cache. Both branches are rows of one batch.

    Args:
        omni: the model.
        settings: options.
        verdict: judges the queries in the place of what `settings` name.
    """

    name = "safecode"

    def __init__(
        self, omni: Omni, settings: SafeCodeSettings = SafeCodeSettings(), verdict: VerdictOf | None = None
    ) -> None:
        super().__init__(omni)
        self.settings = settings
        self._own_verdict = verdict
        self.verdict()
        phrases = refusal_phrases(omni) if settings.phrases is None else settings.phrases
        if not phrases:
            raise InputError("SafeCodeSettings: phrases: give at least one refusal phrase")
        self.guidance = Guidance(omni, settings, phrases)

    def describe(self) -> Description:
        """Logits; a second forward for each guided step, and those of the verdict."""
        return Description(
            name=self.name,
            changes=("logits",),
            extra_forwards=self.settings.steps + float(getattr(self.verdict(), "forwards", 0.0)),
            source="arXiv 2509.19212 and its released code",
            safety_prompt=self.safety_prompt,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """As of every defence, with the verdict's question or maker and the phrases."""
        verdict = self.verdict()
        maker = getattr(verdict, "identity", None) or getattr(verdict, "__qualname__", type(verdict).__qualname__)
        return super().identity | {"verdict": maker, "phrases": list(self.guidance.phrases)}

    def verdict(self, batch_size: int = 16) -> VerdictOf:
        """The judge of the queries; the model's own and CASA's verdict take `batch_size` queries at a time."""
        return self._own_verdict or _verdict(self.omni, self.settings, batch_size)

    def verdicts(self, queries: Sequence[Query], batch_size: int = 16) -> list[bool]:
        """True for each query that is judged unsafe; one that no verdict could be read for is safe (as released)."""
        return [bool(unsafe) for unsafe in self.verdict(batch_size)(queries)]

    def branches(self, queries: Sequence[Query]) -> Branches:
        """The queries and, where they have media, their noised copies."""
        settings = self.settings
        if not settings.alpha:
            return branched(self.omni, queries, [None] * len(queries))
        copies = [noised(query, settings.sigma, settings.seed, audio=settings.extend) for query in queries]
        return branched(self.omni, queries, copies)

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        need_image(queries, self.name, self.settings.extend)
        decode = released if self.settings.mode == "code" else modulated
        verdict = self.verdict(settings.batch_size)
        # The model's own verdict goes on from the cache of the prompts that the reply needs as well.
        on_cache = verdict if isinstance(verdict, ModelVerdict) else None
        began = time.perf_counter()
        judged = [] if on_cache else self.verdicts(queries, settings.batch_size)
        seconds_each = (time.perf_counter() - began) / max(1, len(queries))

        def answer(group: list[int]) -> list[list[int]]:
            members = [queries[index] for index in group]
            branches = self.branches(members)
            if on_cache:
                read = read_prompts(self.omni, branches.batch)
                unsafe = [bool(verdict) for verdict in on_cache.on_read(read, members)]
                branches = replace(branches, start=resumed(self.omni, read))
            else:
                unsafe = [judged[index] for index in group]
            return decode(self.guidance, branches, torch.tensor(unsafe, device=self.omni.device), settings)

        replies = self.omni.decoded(queries, settings, answer, self.name, progress)
        return [reply.model_copy(update={"seconds": reply.seconds + seconds_each}) for reply in replies]


def _verdict(omni: Omni, settings: SafeCodeSettings, batch_size: int) -> VerdictOf:
    if settings.verdict == "model":
        return ModelVerdict(omni, settings.question, batch_size)
    if settings.casa is None:
        raise InputError('SafeCodeSettings: casa: verdict "casa" needs the folder of a trained CASA gate')
    return CasaVerdict(settings.casa, omni, batch_size=batch_size)
