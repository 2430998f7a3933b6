"""SafeCoDe as released (method notes §2): a phrase is forced in, and replies are sampled and capped.

Unsafe: the first contrast ranks the refusal phrases by the summed probability of their tokens, those that say a refusal
outright first; the first tokens of the best are the reply's opening. Safe: refusal tokens are pushed down at the guided
steps, which end early once the reply has two words and a capital. Then ordinary sampling from the real picture alone.
"""

from __future__ import annotations

import torch
from torch import BoolTensor, LongTensor, Tensor

from casa_mech.defenses.prompts import REFUSAL_KEYWORDS
from casa_mech.defenses.safecode import SafeCode, contrast, guided_then_alone
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.trace.contrast import Branches, Choose, Sampling, pick

PHRASE_TOKENS = 5
QUOTES = ('"', "'", "“", "”", "‘", "’", "`")


def released(
    defense: SafeCode, branches: Branches, unsafe: BoolTensor, settings: GenerationSettings
) -> list[list[int]]:
    """Mode "code": ids of each query's reply."""
    run = _Released(defense, branches, unsafe, settings)
    longest = min(settings.max_new_tokens, int(run.caps.max()))
    return guided_then_alone(defense, branches, run.guide, run.alone, longest)


class _Released:
    """The choices of one batch. `caps` [row]: most tokens of each reply."""

    def __init__(self, defense: SafeCode, branches: Branches, unsafe: BoolTensor, settings: GenerationSettings) -> None:
        options, device = defense.settings, defense.omni.device
        self._defense, self._of, self._unsafe = defense, branches.of, unsafe
        self.caps = torch.where(unsafe, options.unsafe_tokens, options.safe_tokens)
        self._plain = self._guided = Sampling.of(settings, branches.size, device)
        if options.released_sampling:
            temperature = torch.where(unsafe, options.unsafe_temperature, options.safe_temperature)
            self._plain = Sampling(temperature, torch.where(unsafe, options.unsafe_top_p, options.safe_top_p))
            self._guided = Sampling(temperature, torch.ones_like(temperature))
        self._quotes = torch.tensor(_quote_ids(defense.omni), dtype=torch.long, device=device)
        self._phrases: list[list[int]] = [[] for _ in range(branches.size)]
        self._written: list[list[int]] = [[] for _ in range(branches.size)]

    def guide(self, step: int, logits: Tensor, noised_logits: Tensor) -> LongTensor:
        """One of the guided steps."""
        guided = self._defense.guided(logits, noised_logits, self._of, self._unsafe)
        if step == 0:
            self._phrases = self._chosen_phrases(logits, noised_logits)
            bare = self._unsafe.logical_not()[:, None] & torch.zeros_like(guided, dtype=torch.bool).index_fill(
                1, self._quotes, True
            )
            chosen = guided.masked_fill(bare, -torch.inf).argmax(dim=-1)
        else:
            over = torch.tensor([self._is_over(row) for row in range(len(logits))], device=logits.device)
            chosen = torch.where(over, pick(logits, self._plain), pick(guided, self._guided))
        for row, phrase in enumerate(self._phrases):
            if step < len(phrase):
                chosen[row] = phrase[step]
        for ids, token in zip(self._written, chosen.tolist(), strict=True):
            ids.append(token)
        return self._capped(step, chosen, self.caps)

    def alone(self, rows: LongTensor) -> Choose:
        """Ordinary sampling for `rows`, each under its own cap."""
        sampling, caps, before = self._plain[rows], self.caps[rows], len(self._written[0])
        return lambda step, logits, _: self._capped(before + step, pick(logits, sampling), caps)

    def _chosen_phrases(self, logits: Tensor, noised_logits: Tensor) -> list[list[int]]:
        """For each unsafe row the opening to force in; none with one guided step, where refusals are only boosted."""
        defense, steps = self._defense, self._defense.settings.steps
        if steps < 2:
            return self._phrases
        alpha = torch.full((len(logits),), defense.settings.alpha, device=logits.device)
        probabilities = contrast(logits, noised_logits, self._of, alpha).softmax(dim=-1)
        pairs = list(zip(defense.phrases, defense.phrase_ids, strict=True))
        outright = [ids for text, ids in pairs if any(word in text.lower() for word in REFUSAL_KEYWORDS)]
        options = outright or defense.phrase_ids
        best = torch.stack([probabilities[:, ids].sum(dim=1) for ids in options], dim=1).argmax(dim=1).tolist()
        limit = min(PHRASE_TOKENS, steps)
        return [
            options[index][:limit] if unsafe else [] for index, unsafe in zip(best, self._unsafe.tolist(), strict=True)
        ]

    def _is_over(self, row: int) -> bool:
        """Whether a row's guidance is over after its first step: unsafe, or two words, the first capitalised."""
        if self._unsafe[row]:
            return True
        words = self._defense.omni.decode(self._written[row]).split()
        return len(words) >= 2 and words[0][:1].isupper()

    def _capped(self, step: int, chosen: LongTensor, caps: LongTensor) -> LongTensor:
        return torch.where(caps <= step, self._defense.omni.end_id, chosen)


def _quote_ids(omni: Omni) -> list[int]:
    """Tokens that are a quotation mark and nothing else."""
    rows = [
        omni.tokenizer(text, add_special_tokens=False)["input_ids"] for mark in QUOTES for text in (mark, f" {mark}")
    ]
    return sorted({row[0] for row in rows if len(row) == 1 and row[0] != omni.tokenizer.unk_token_id})
