"""Greedy coordinate gradient: a suffix of ordinary words, exchanged one at a time (Zou et al., arXiv 2307.15043)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from casa_mech.attacks.seeding import query_rng
from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging import Judge
from casa_mech.omni import GenerationSettings, OmniBatch
from casa_mech.queries import Query, TextPart
from casa_mech.whitebox.gradient import GradientSettings, run_attack, start_purpose
from casa_mech.whitebox.objective import Objective, check_queries
from casa_mech.whitebox.results import AttackResult, Measured


class SuffixSettings(GradientSettings):
    """One run of greedy coordinate gradient."""

    tokens: int = Field(default=8, ge=1)
    """Words of the suffix, a token each."""
    steps: int = Field(default=10, ge=1)
    """Rounds; in each, one word of each query's suffix may change."""
    top_k: int = Field(default=32, ge=1)
    """Words by their gradient from which a place's candidates are drawn."""
    candidates: int = Field(default=32, ge=1)
    """Suffixes that are tried for a query in one round."""
    words: tuple[str, ...] = ()
    """The words that a suffix may have; all ordinary ones when empty."""
    rows: int = Field(default=256, ge=1)
    """Candidates in one forward."""


def ordinary_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str] = ()) -> LongTensor:
    """Ids [word], rising, of the tokens that are a word of letters and, after a space, are encoded as that token again.

    So a suffix of them is the same in text as in tokens. With `words`, only those among them.

    Raises:
        InputError: fewer than two.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    texts = [text.strip() for text in tokenizer.batch_decode([[token] for token in ids])]
    plain = [(token, text) for token, text in zip(ids, texts, strict=True) if text.isascii() and text.isalpha()]
    if words:
        plain = [(token, text) for token, text in plain if text in set(words)]
    encoded = tokenizer([f" {text}" for _, text in plain], add_special_tokens=False)["input_ids"] if plain else []
    usable = [token for (token, _), pieces in zip(plain, encoded, strict=True) if pieces == [token]]
    if len(usable) < 2:
        which = "of the given words" if words else "of its words"
        raise InputError(
            f"the tokenizer has {len(usable)} usable tokens {which}: a suffix needs whole words of letters"
        )
    return torch.tensor(usable)


def suffix_attack(
    casa: Casa,
    queries: Sequence[Query],
    settings: SuffixSettings,
    judge: Judge | None = None,
    generation: GenerationSettings = GenerationSettings(),
    before: Sequence[Measured] | None = None,
) -> list[AttackResult]:
    """Append a suffix to the text of each query and exchange its words, the best of many candidates in each step.

    Args:
        casa: the gate on its model; it is as it was afterwards.
        queries: any mixture; pictures and clips are left alone.
        settings: aim, length and steps.
        judge: of the replies; the keyword judge, an upper bound, when not given.
        generation: how the replies that are measured are generated.
        before: the clean queries, measured (see `measure`), where that was done already.

    Returns:
        For each of `settings.reported` a result for each query, in their order.

    Raises:
        InputError: a tokenizer without usable words, and what `check_queries` refuses.
    """
    check_queries(queries, settings.aim)
    allowed = ordinary_words(casa.omni.tokenizer, settings.words)

    def optimise(group: Sequence[Query], start: int) -> tuple[list[list[Query]], Tensor]:
        suffixes, margins = _optimise(casa, group, settings, allowed, start)
        return [
            [_with_suffix(query, _text(casa, ids)) for query, ids in zip(group, reported, strict=True)]
            for reported in suffixes
        ], margins

    return run_attack(
        casa, queries, settings, optimise, attack="suffix", budget=float(settings.tokens), judge=judge,
        generation=generation, before=before,
    )  # fmt: skip


@dataclass(frozen=True)
class _Trial:
    """Copies of queries whose suffixes can be exchanged."""

    objective: Objective
    """The aim, on the copies."""
    row: LongTensor
    """The query in the group that each copy is of [copy]."""
    at: LongTensor
    """Positions of the suffix [copy, token]."""

    def batch(self, suffixes: Tensor) -> OmniBatch:
        """The batch with `suffixes` [copy, token] in it."""
        batch = self.objective.batch
        ids = batch.inputs["input_ids"].scatter(1, self.at, suffixes)
        return replace(batch, inputs={**batch.inputs, "input_ids": ids})


def _trial(
    casa: Casa, queries: Sequence[Query], rows: Sequence[int], suffixes: Tensor, settings: SuffixSettings
) -> _Trial:
    """`queries[row]` for each of `rows`, with its suffix of `suffixes` [query, token]."""
    carriers = [_with_suffix(queries[row], _text(casa, suffixes[row])) for row in rows]
    objective = Objective(casa, carriers, settings.aim, settings.opening_tokens)
    text = objective.batch.modality["text"]
    # The suffix is the user's last text, so its tokens are the last in that role.
    places = torch.arange(text.shape[1], device=text.device).expand_as(text).masked_fill(~text, -1)
    at = places.topk(settings.tokens, dim=1).values.flip(1)
    trial = _Trial(objective, torch.tensor(list(rows), device=text.device), at)
    assert torch.equal(objective.batch.inputs["input_ids"].gather(1, at), suffixes[trial.row])
    return trial


def _optimise(
    casa: Casa, queries: Sequence[Query], settings: SuffixSettings, allowed: LongTensor, start: int
) -> tuple[list[Tensor], Tensor]:
    """Suffixes [query, token] after each of `settings.reported` steps, and the margins of all steps [step, query]."""
    device = casa.omni.device
    rngs = [query_rng(query, settings.seed, start_purpose("suffix", start)) for query in queries]
    draws = np.stack([rng.integers(len(allowed), size=settings.tokens) for rng in rngs])
    suffixes = allowed[torch.from_numpy(draws)].to(device)
    whole = _trial(casa, queries, range(len(queries)), suffixes, settings)
    share = max(1, settings.rows // settings.candidates)
    trials = [
        _trial(casa, queries, np.repeat(rows, settings.candidates).tolist(), suffixes, settings)
        for rows in np.split(np.arange(len(queries)), range(share, len(queries), share))
    ]
    reports, margins = [], []
    with whole.objective.running():
        for step in range(settings.steps + 1):
            value, margin, slope = _gradient(casa, whole, suffixes, allowed, settings.watch, step == settings.steps)
            margins.append(margin.cpu())
            if step in settings.reported:
                reports.append(suffixes)
            if slope is None:
                break
            tried = _candidates(suffixes, slope, allowed.to(device), settings, rngs)
            losses = torch.cat([_values(trial, tried) for trial in trials]).view(len(queries), -1)
            suffixes = _best(casa, suffixes, tried, value, losses)
    return reports, torch.stack(margins)


def _gradient(
    casa: Casa, trial: _Trial, suffixes: Tensor, allowed: LongTensor, watch: bool, last: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss [query], margin [query], and the loss's slope [query, token, word] in each place's one-hot of words."""
    batch, matrix = trial.batch(suffixes), casa.omni.embedding.weight.detach()
    if last:
        losses = trial.objective(batch, watch=watch)
        return losses.value, losses.margin, None
    added = matrix.new_zeros(*batch.inputs["input_ids"].shape, matrix.shape[1]).requires_grad_()
    losses = trial.objective(batch, [added], added, watch)
    (slope,) = losses.slopes
    here = slope.gather(1, trial.at.unsqueeze(-1).expand(-1, -1, slope.shape[-1]))
    return losses.value, losses.margin, here @ matrix[allowed.to(matrix.device)].T


def _values(trial: _Trial, tried: Tensor) -> Tensor:
    """Losses [copy] of the candidates in `tried` [query, candidate, token] of the queries of `trial`."""
    own = tried[trial.row.unique()].flatten(0, 1)
    return trial.objective(trial.batch(own), watch=False).value


def _candidates(
    suffixes: Tensor, slope: Tensor, allowed: LongTensor, settings: SuffixSettings, rngs: Sequence[np.random.Generator]
) -> Tensor:
    """Suffixes [query, candidate, token], each with one word exchanged for one of the `top_k` of its place."""
    best = (-slope).topk(min(settings.top_k, len(allowed)), dim=-1).indices
    count = settings.candidates
    place = torch.from_numpy(np.stack([rng.integers(suffixes.shape[1], size=count) for rng in rngs])).to(best.device)
    rank = torch.from_numpy(np.stack([rng.integers(best.shape[2], size=count) for rng in rngs])).to(best.device)
    query = torch.arange(len(rngs), device=best.device).unsqueeze(1)
    tried = suffixes.unsqueeze(1).repeat(1, count, 1)
    return tried.scatter(2, place.unsqueeze(-1), allowed[best[query, place, rank]].unsqueeze(-1))


def _best(casa: Casa, suffixes: Tensor, tried: Tensor, value: Tensor, losses: Tensor) -> Tensor:
    """For each query the candidate of the lowest loss [query, candidate] whose text is encoded as its tokens again; its
    present suffix where that is better."""
    best = suffixes.clone()
    for row, order in enumerate(losses.argsort(dim=1, stable=True).tolist()):
        for index in order:
            if losses[row, index] >= value[row]:
                break
            if _survives_text(casa, tried[row, index]):
                best[row] = tried[row, index]
                break
    return best


def _survives_text(casa: Casa, ids: Tensor) -> bool:
    """True where the words of `ids` are encoded as `ids` again."""
    encoded: list[int] = casa.omni.tokenizer(_text(casa, ids), add_special_tokens=False)["input_ids"]
    return encoded == ids.tolist()


def _text(casa: Casa, ids: Tensor) -> str:
    """The words of `ids` [token], each after a space."""
    return "".join(f" {casa.omni.tokenizer.decode([token]).strip()}" for token in ids.tolist())


def _with_suffix(query: Query, suffix: str) -> Query:
    return query.model_copy(update={"parts": (*query.parts, TextPart(text=suffix))})
