"""SafeCoDe: contrast with a noised picture, then push refusals up or down by a verdict (arXiv 2509.19212; notes §2).

`mode="paper"` follows the description, `mode="code"` what the released program does: it forces a refusal phrase after
an unsafe verdict, and samples at its own temperatures under its own caps (`casa_mech.defenses.safecode_released`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.defenses.base import Defense, DefenseSettings, Description
from casa_mech.defenses.media import need_image, noised
from casa_mech.defenses.prompts import refusal_phrases
from casa_mech.defenses.verdict import CasaVerdict, ModelVerdict, VerdictOf
from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply
from casa_mech.trace.contrast import Branches, Choose, Sampling, branched, continue_alone, decode_branches, pick
from casa_mech.trace.fork import read_prompts, resumed

Alone = Callable[[LongTensor], Choose]
"""Rows of the batch that are still open → how their tokens are chosen once the guided steps are over."""


class SafeCodeSettings(DefenseSettings):
    """Options of SafeCoDe. Defaults are those of the released command line, which its notes call the paper's."""

    mode: Literal["paper", "code"] = "paper"
    """Modulate the probabilities at every guided step, or do what the released program does."""
    alpha: float = Field(0.3, ge=0, lt=1)
    """Weight of the noised branch: z_cd = z - alpha z_noised."""
    sigma: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Standard deviation of the noise, for pixels in [0, 1]; for clips in units of their peak."""
    steps: int = Field(5, ge=1)
    """Guided steps; after them decoding is ordinary."""
    boost: float = Field(1.0, ge=0, allow_inf_nan=False)
    """lambda_boost: after an unsafe verdict, refusal tokens' probabilities times 1 + boost."""
    suppress: float = Field(1.0, ge=0, le=1)
    """lambda_supp: after a safe verdict, refusal tokens' probabilities times 1 - suppress."""
    safe_scale: float = Field(0.5, ge=0, le=1)
    """What alpha and suppress are multiplied by after a safe verdict, as released; 1 for the formula to the letter."""
    verdict: Literal["model", "casa"] = "model"
    """Who judges the query: the model itself or CASA's v_s. Any other callable is given to `SafeCode` directly."""
    question: str | None = None
    """The model's own verdict: the question after the request; None for the package's."""
    casa: Path | None = None
    """Folder of the CASA gate, for verdict "casa"."""
    phrases: tuple[str, ...] | None = None
    """Refusal phrases, whose tokens are the refusal set; None for the package's own in the model's words."""
    extend: bool = True
    """Take text and audio too, which the paper does not define: clips are noised, text has no contrast."""
    seed: int = 0
    """Of the noise."""
    released_sampling: bool = True
    """In mode "code", sample at the released temperatures rather than as the generation settings say."""
    safe_temperature: float = Field(0.8, gt=0)
    """Mode "code": temperature after a safe verdict."""
    safe_top_p: float = Field(0.9, gt=0, le=1)
    """Mode "code": nucleus after a safe verdict, once the guided steps are over."""
    unsafe_temperature: float = Field(0.7, gt=0)
    """Mode "code": temperature after an unsafe verdict."""
    unsafe_top_p: float = Field(0.85, gt=0, le=1)
    """Mode "code": nucleus after an unsafe verdict."""
    safe_tokens: int = Field(256, ge=1)
    """Mode "code": most tokens of a reply after a safe verdict (released: 256; InstructBLIP and IDEFICS 1024)."""
    unsafe_tokens: int = Field(30, ge=1)
    """Mode "code": the same after an unsafe verdict (released: LLaVA 20, Qwen 30, InstructBLIP 100, IDEFICS 200)."""


class SafeCode(Defense):
    """Safety-aware contrastive decoding.

    A verdict on the query, once; then for the first `steps` tokens two branches, the query and a copy with noise on its
    media, whose logits are contrasted and whose refusal tokens are pushed up (unsafe) or down (safe); then ordinary
    decoding from the first branch's cache. Both branches are rows of one batch.
    """

    name = "safecode"

    def __init__(
        self, omni: Omni, settings: SafeCodeSettings = SafeCodeSettings(), verdict: VerdictOf | None = None
    ) -> None:
        super().__init__(omni)
        self.settings = settings
        self._given = verdict
        self.verdict()
        self.phrases = refusal_phrases(omni) if settings.phrases is None else settings.phrases
        if not self.phrases:
            raise InputError("SafeCodeSettings: phrases: give at least one refusal phrase")

    @cached_property
    def phrase_ids(self) -> list[list[int]]:
        """Token ids of each refusal phrase."""
        return [self.omni.tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in self.phrases]

    @cached_property
    def refusal_set(self) -> BoolTensor:
        """Bool [vocab]: the tokens of all refusal phrases, common ones such as punctuation included (as released)."""
        found = torch.zeros(self.omni.vocab_size, dtype=torch.bool, device=self.omni.device)
        found[[token for ids in self.phrase_ids for token in ids]] = True
        return found

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
        told = getattr(verdict, "identity", None) or getattr(verdict, "__qualname__", type(verdict).__qualname__)
        return super().identity | {"verdict": told, "phrases": list(self.phrases)}

    def verdict(self, batch_size: int = 16) -> VerdictOf:
        """Who judges the queries; the model's own and CASA's verdict take `batch_size` queries at a time."""
        return self._given or _verdict(self.omni, self.settings, batch_size)

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        from casa_mech.defenses.safecode_released import released

        need_image(queries, self.name, self.settings.extend)
        decode = released if self.settings.mode == "code" else modulated
        verdict = self.verdict(settings.batch_size)
        # The model's own verdict goes on from the cache of the prompts that the reply needs as well.
        own = verdict if isinstance(verdict, ModelVerdict) else None
        began = time.perf_counter()
        found = [] if own else self.verdicts(queries, settings.batch_size)
        share = (time.perf_counter() - began) / max(1, len(queries))

        def answer(group: list[int]) -> list[list[int]]:
            chosen = [queries[index] for index in group]
            branches = self.branches(chosen)
            if own:
                read = read_prompts(self.omni, branches.batch)
                unsafe = [bool(found) for found in own.on_read(read, chosen)]
                branches = replace(branches, start=resumed(self.omni, read))
            else:
                unsafe = [found[index] for index in group]
            return decode(self, branches, torch.tensor(unsafe, device=self.omni.device), settings)

        replies = self.omni.decoded(queries, settings, answer, self.name, progress)
        return [reply.model_copy(update={"seconds": reply.seconds + share}) for reply in replies]

    def verdicts(self, queries: Sequence[Query], batch_size: int = 16) -> list[bool]:
        """Whether each query is found unsafe; one that no verdict could be read for is taken as safe (as released)."""
        return [bool(found) for found in self.verdict(batch_size)(queries)]

    def branches(self, queries: Sequence[Query]) -> Branches:
        """The queries and, where they have media, their noised copies."""
        options = self.settings
        if not options.alpha:
            return branched(self.omni, queries, [None] * len(queries))
        copies = [noised(query, options.sigma, options.seed, audio=options.extend) for query in queries]
        return branched(self.omni, queries, copies)

    def guided(self, logits: Tensor, noised_logits: Tensor, of: LongTensor, unsafe: BoolTensor) -> Tensor:
        """Log-probabilities [row, vocab] of one guided step: contrast, then modulation by the verdict [row]."""
        options = self.settings
        alpha = torch.where(unsafe, options.alpha, options.alpha * options.safe_scale)
        factor = torch.where(unsafe, 1 + options.boost, 1 - options.suppress * options.safe_scale)
        return modulate(contrast(logits, noised_logits, of, alpha), self.refusal_set, factor)


def contrast(logits: Tensor, noised_logits: Tensor, of: LongTensor, alpha: Tensor) -> Tensor:
    """z - alpha z_noised [row, vocab], for the rows `of` that have a noised branch; the others keep their z.

    Without noise this is (1 - alpha) z: the temperature changes, since the released form is not that of VCD.
    """
    return logits.index_add(0, of, alpha[of, None] * noised_logits, alpha=-1)


def modulate(logits: Tensor, tokens: BoolTensor, factor: Tensor) -> Tensor:
    """Log-probabilities [row, vocab]: those of `logits`, the `tokens`' made `factor` [row] times as probable.

    A factor of 0 rules the tokens out.
    """
    weight = torch.where(tokens[None], factor[:, None].log(), 0.0)
    return (logits.log_softmax(dim=-1) + weight).log_softmax(dim=-1)


def modulated(
    defense: SafeCode, branches: Branches, unsafe: BoolTensor, settings: GenerationSettings
) -> list[list[int]]:
    """Mode "paper": modulation at each guided step, then ordinary decoding; greedy or sampled as `settings` say."""
    sampling = Sampling.of(settings, branches.size, defense.omni.device)

    def guide(_: int, logits: Tensor, noised_logits: Tensor) -> Tensor:
        return pick(defense.guided(logits, noised_logits, branches.of, unsafe), sampling)

    def alone(rows: LongTensor) -> Choose:
        return lambda step, logits, _: pick(logits, sampling[rows])

    return guided_then_alone(defense, branches, guide, alone, settings.max_new_tokens)


def guided_then_alone(
    defense: SafeCode, branches: Branches, guide: Choose, alone: Alone, max_new_tokens: int
) -> list[list[int]]:
    """Ids of each query's reply: the guided steps in two branches, then `alone` from the first branch's cache."""
    omni = defense.omni
    decoded = decode_branches(omni, branches, guide, min(defense.settings.steps, max_new_tokens))
    written = [row.tolist() for row in decoded.new]
    still = [row for row, ids in enumerate(written) if omni.end_id not in ids]
    left = max_new_tokens - decoded.new.shape[1]
    if still and left > 0:
        rows = torch.tensor(still, device=omni.device)
        more = continue_alone(omni, branches, decoded, alone(rows), still, left)
        for row, ids in zip(still, more.tolist(), strict=True):
            written[row] += ids
    return written


def _verdict(omni: Omni, settings: SafeCodeSettings, batch_size: int) -> VerdictOf:
    if settings.verdict == "model":
        return ModelVerdict(omni, settings.question, batch_size)
    if settings.casa is None:
        raise InputError('SafeCodeSettings: casa: verdict "casa" needs the folder of a trained CASA gate')
    return CasaVerdict(settings.casa, omni, batch_size=batch_size)
