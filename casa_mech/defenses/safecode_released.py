"""SafeCoDe as released (docs/method.md §2): a phrase is forced in, and replies are sampled and capped.

Unsafe: the first contrast ranks the refusal phrases by the summed probability of their tokens, those that say a refusal
outright first; the first tokens of the best are the reply's opening. Safe: refusal tokens are pushed down at the guided
steps, which end early once the reply has two words and a capital. Then ordinary sampling from the real picture alone.
"""

from __future__ import annotations

import torch
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.defenses.prompts import REFUSAL_KEYWORDS
from casa_mech.defenses.safecode_decoding import Guidance, contrast, guided_then_alone
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.trace.contrast import Branches, Choose, Sampling, pick

PHRASE_TOKENS = 5
"""Most tokens of a phrase that are forced in."""
QUOTES = ('"', "'", "“", "”", "‘", "’", "`")
"""Marks that a reply after a safe verdict does not begin with."""


def released(
    guidance: Guidance, branches: Branches, unsafe: BoolTensor, settings: GenerationSettings
) -> list[list[int]]:
    """Ids of each query's reply in mode "code"."""
    choices = _Choices(guidance, branches, unsafe, settings)
    longest = min(settings.max_new_tokens, int(choices.caps.max()))
    return guided_then_alone(guidance, branches, choices.guide, choices.alone, longest)


class _Choices:
    """The choices of one batch. `caps` [row]: most tokens of each reply."""

    def __init__(
        self, guidance: Guidance, branches: Branches, unsafe: BoolTensor, settings: GenerationSettings
    ) -> None:
        options, device = guidance.settings, guidance.omni.device
        self._guidance, self._of, self._unsafe = guidance, branches.of, unsafe
        self.caps = torch.where(unsafe, options.unsafe_tokens, options.safe_tokens)
        self._plain = self._guided = Sampling.of(settings, branches.size, device)
        if options.released_sampling:
            temperature = torch.where(unsafe, options.unsafe_temperature, options.safe_temperature)
            self._plain = Sampling(temperature, torch.where(unsafe, options.unsafe_top_p, options.safe_top_p))
            self._guided = Sampling(temperature, torch.ones_like(temperature))
        self._quotes = torch.tensor(_quote_ids(guidance.omni), dtype=torch.long, device=device)
        self._phrases: list[list[int]] = [[] for _ in range(branches.size)]
        self._replies: list[list[int]] = [[] for _ in range(branches.size)]

    def guide(self, step: int, logits: Tensor, noised_logits: Tensor) -> LongTensor:
        """Ids [row] of one of the guided steps."""
        guided = self._guidance.log_probabilities(logits, noised_logits, self._of, self._unsafe)
        if step == 0:
            self._phrases = self._ranked_first(logits, noised_logits)
            is_quote = torch.zeros_like(guided, dtype=torch.bool).index_fill(1, self._quotes, True)
            ids = guided.masked_fill(self._unsafe.logical_not()[:, None] & is_quote, -torch.inf).argmax(dim=-1)
        else:
            over = torch.tensor([self._is_over(row) for row in range(len(logits))], device=logits.device)
            ids = torch.where(over, pick(logits, self._plain), pick(guided, self._guided))
        for row, phrase in enumerate(self._phrases):
            if step < len(phrase):
                ids[row] = phrase[step]
        for reply, token in zip(self._replies, ids.tolist(), strict=True):
            reply.append(token)
        return self._capped(step, ids, self.caps)

    def alone(self, rows: LongTensor) -> Choose:
        """Ordinary sampling for `rows`, each under its own cap."""
        sampling, caps, before = self._plain[rows], self.caps[rows], len(self._replies[0])
        return lambda step, logits, _: self._capped(before + step, pick(logits, sampling), caps)

    def _ranked_first(self, logits: Tensor, noised_logits: Tensor) -> list[list[int]]:
        """For each unsafe row the opening to force in; none with one guided step, where refusals are only boosted."""
        guidance, steps = self._guidance, self._guidance.settings.steps
        if steps < 2:
            return self._phrases
        alpha = torch.full((len(logits),), guidance.settings.alpha, device=logits.device)
        probabilities = contrast(logits, noised_logits, self._of, alpha).softmax(dim=-1)
        pairs = list(zip(guidance.phrases, guidance.phrase_ids, strict=True))
        outright = [ids for text, ids in pairs if any(word in text.lower() for word in REFUSAL_KEYWORDS)]
        openings = outright or guidance.phrase_ids
        best = torch.stack([probabilities[:, ids].sum(dim=1) for ids in openings], dim=1).argmax(dim=1).tolist()
        limit = min(PHRASE_TOKENS, steps)
        return [
            openings[index][:limit] if unsafe else [] for index, unsafe in zip(best, self._unsafe.tolist(), strict=True)
        ]

    def _is_over(self, row: int) -> bool:
        """True once a row's guidance is over, from its second step on: unsafe, or two words, the first capitalised."""
        if self._unsafe[row]:
            return True
        words = self._guidance.omni.decode(self._replies[row]).split()
        return len(words) >= 2 and words[0][:1].isupper()

    def _capped(self, step: int, ids: LongTensor, caps: LongTensor) -> LongTensor:
        return torch.where(caps <= step, self._guidance.omni.end_id, ids)


def _quote_ids(omni: Omni) -> list[int]:
    """Tokens that are a quotation mark and nothing else."""
    rows = [
        omni.tokenizer(text, add_special_tokens=False)["input_ids"] for mark in QUOTES for text in (mark, f" {mark}")
    ]
    return sorted({row[0] for row in rows if len(row) == 1 and row[0] != omni.tokenizer.unk_token_id})
