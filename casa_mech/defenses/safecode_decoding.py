"""Decoding under SafeCoDe: contrast with the noised branch, modulation by the verdict, then ordinary decoding.

The two modes of the defence are built on this: `modulated` below (mode "paper") and `safecode_released` (mode "code").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.defenses.base import DefenseSettings
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.trace.contrast import Branches, Choose, Sampling, continue_alone, decode_branches, pick

ChooseAlone = Callable[[LongTensor], Choose]
"""Rows of the batch that have not ended → how their tokens are chosen once the guided steps are over."""


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
    """Factor on alpha and suppress after a safe verdict, as released; 1 for the formula to the letter."""
    verdict: Literal["model", "casa"] = "model"
    """The judge of the query: the model itself or CASA's v_s. Any other callable is given to `SafeCode` directly."""
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


class Guidance:
    """The effect of a verdict on the logits of one model.

    Args:
        omni: the model.
        settings: weights of contrast and modulation.
        phrases: refusal phrases.
    """

    def __init__(self, omni: Omni, settings: SafeCodeSettings, phrases: tuple[str, ...]) -> None:
        self.omni, self.settings, self.phrases = omni, settings, phrases

    @cached_property
    def phrase_ids(self) -> list[list[int]]:
        """Token ids of each refusal phrase."""
        return [self.omni.tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in self.phrases]

    @cached_property
    def refusal_set(self) -> BoolTensor:
        """Bool [vocab]: the tokens of all refusal phrases, common ones such as punctuation included (as released)."""
        in_phrase = torch.zeros(self.omni.vocab_size, dtype=torch.bool, device=self.omni.device)
        in_phrase[[token for ids in self.phrase_ids for token in ids]] = True
        return in_phrase

    def log_probabilities(self, logits: Tensor, noised_logits: Tensor, of: LongTensor, unsafe: BoolTensor) -> Tensor:
        """Log-probabilities [row, vocab] of one guided step: contrast, then modulation by the verdict [row]."""
        settings = self.settings
        alpha = torch.where(unsafe, settings.alpha, settings.alpha * settings.safe_scale)
        factor = torch.where(unsafe, 1 + settings.boost, 1 - settings.suppress * settings.safe_scale)
        return modulate(contrast(logits, noised_logits, of, alpha), self.refusal_set, factor)


def contrast(logits: Tensor, noised_logits: Tensor, of: LongTensor, alpha: Tensor) -> Tensor:
    """z - alpha z_noised [row, vocab], for the rows `of` that have a noised branch; the others keep their z.

    Without noise this is (1 - alpha) z: the temperature changes, since the released form is not that of VCD.
    """
    return logits.index_add(0, of, alpha[of, None] * noised_logits, alpha=-1)


def modulate(logits: Tensor, tokens: BoolTensor, factor: Tensor) -> Tensor:
    """Log-probabilities [row, vocab] of `logits`, with the `tokens` `factor` [row] times as probable.

    A factor of 0 rules the tokens out.
    """
    weight = torch.where(tokens[None], factor[:, None].log(), 0.0)
    return (logits.log_softmax(dim=-1) + weight).log_softmax(dim=-1)


def modulated(
    guidance: Guidance, branches: Branches, unsafe: BoolTensor, settings: GenerationSettings
) -> list[list[int]]:
    """Ids of each reply in mode "paper": modulation at each guided step, then ordinary decoding, greedy or sampled as
    `settings` say."""
    sampling = Sampling.of(settings, branches.size, guidance.omni.device)

    def guide(_: int, logits: Tensor, noised_logits: Tensor) -> Tensor:
        return pick(guidance.log_probabilities(logits, noised_logits, branches.of, unsafe), sampling)

    def alone(rows: LongTensor) -> Choose:
        return lambda step, logits, _: pick(logits, sampling[rows])

    return guided_then_alone(guidance, branches, guide, alone, settings.max_new_tokens)


def guided_then_alone(
    guidance: Guidance, branches: Branches, guide: Choose, alone: ChooseAlone, max_new_tokens: int
) -> list[list[int]]:
    """Ids of each query's reply: the guided steps in two branches, then `alone` from the first branch's cache."""
    omni = guidance.omni
    decoded = decode_branches(omni, branches, guide, min(guidance.settings.steps, max_new_tokens))
    replies = [row.tolist() for row in decoded.new]
    unfinished = [row for row, ids in enumerate(replies) if omni.end_id not in ids]
    left = max_new_tokens - decoded.new.shape[1]
    if unfinished and left > 0:
        rows = torch.tensor(unfinished, device=omni.device)
        more = continue_alone(omni, branches, decoded, alone(rows), unfinished, left)
        for row, ids in zip(unfinished, more.tolist(), strict=True):
            replies[row] += ids
    return replies
