"""Two-branch decoding: next to each query a second prompt, in one batch with one cache, both given the same tokens.

What is changed here are the logits, so no step needs a trace: the second prompts are further rows of the batch, and a
logits processor chooses one token for both rows of a pair. Decoding is Hugging Face's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from casa_mech.omni import GenerationSettings, Omni, OmniBatch
from casa_mech.omni.finite import check_decision
from casa_mech.queries import Query
from casa_mech.trace.fork import Start, beside, joined, read_prompts, resumed
from casa_mech.trace.generate import continue_from

Choose = Callable[[int, Tensor, Tensor], LongTensor]
"""(step from 0, logits [row, vocab] of the queries, logits [second, vocab] of the second prompts) → ids [row]."""


@dataclass(frozen=True)
class Branches:
    """`queries` and, as further rows of the same batch, second prompts; `of` [second]: whose each one is.

    start: what to decode from, the batch's inputs unless the prompts were read before.
    """

    batch: OmniBatch
    queries: Sequence[Query]
    of: LongTensor
    start: Start | None = None

    @property
    def size(self) -> int:
        """Number of queries."""
        return len(self.queries)

    @property
    def rows(self) -> int:
        """Rows of the batch: queries and second prompts."""
        return self.size + len(self.of)


@dataclass(frozen=True)
class Decoded:
    """Ids `new` [row, new position], end-of-turn and padding included, of the queries alone; `cache` of all rows."""

    new: LongTensor
    cache: Any


def branched(omni: Omni, queries: Sequence[Query], seconds: Sequence[Query | None]) -> Branches:
    """`queries` and their second prompts as one left-padded batch; None for a query that has no second prompt."""
    of = [row for row, second in enumerate(seconds) if second is not None]
    batch = omni.encode([*queries, *(second for second in seconds if second is not None)])
    return Branches(batch, queries, torch.tensor(of, dtype=torch.long, device=omni.device))


def told_apart(omni: Omni, queries: Sequence[Query], told: Sequence[Query]) -> Branches:
    """Each of `queries` and its wording in `told`, about the same media: these are encoded and read once, if they come
    before what is worded differently."""
    everyone = list(range(len(queries)))
    plain = read_prompts(omni, omni.encode(queries))
    if any(query.modalities - {"text"} for query in queries):
        principled = read_prompts(omni, plain.batch, beside(omni, plain, told))
    else:
        principled = read_prompts(omni, omni.encode(told))
    start = resumed(omni, joined(omni, plain, principled))
    return Branches(plain.batch, queries, torch.tensor(everyone, device=omni.device), start)


def decode_branches(omni: Omni, branches: Branches, choose: Choose, max_new_tokens: int) -> Decoded:
    """Decode with `choose` at every step, until each query has ended or has `max_new_tokens`.

    Raises:
        ModelError: logits that are not finite; it names the query.
    """
    start = branches.batch.inputs if branches.start is None else branches.start
    processor = LogitsProcessorList([_OneToken(choose, branches.queries, branches.of)])
    found = omni.model.generate(
        **start,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=processor,
        return_dict_in_generate=True,
    )
    width = start["input_ids"].shape[1]
    return Decoded(found.sequences[: branches.size, width:], found.past_key_values)


def continue_alone(
    omni: Omni, branches: Branches, decoded: Decoded, choose: Choose, rows: Sequence[int], max_new_tokens: int
) -> LongTensor:
    """Decode on from `decoded` without the second prompts, whose cache is let go; ids [row, new position] of `rows`.

    `choose` sees the steps from 0 again, the logits of `rows` in their order, and no second logits.
    """
    nobody = torch.empty(0, dtype=torch.long, device=omni.device)
    kwargs: dict[str, object] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "logits_processor": LogitsProcessorList([_OneToken(choose, [branches.queries[row] for row in rows], nobody)]),
    }
    forced = [decoded.new[row].tolist() for row in rows]
    return continue_from(omni, branches.batch, decoded.cache, forced, rows, kwargs)


class _OneToken(LogitsProcessor):
    """Rules out every token but the chosen one, in both rows of a pair, so that greedy decoding takes it."""

    def __init__(self, choose: Choose, queries: Sequence[Query], of: LongTensor) -> None:
        self._choose, self._size, self._of = choose, len(queries), of
        self._queries = [*queries, *(queries[row] for row in of.tolist())]
        self._step = 0

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        check_decision("a logit of the reply", scores, self._queries)
        chosen = self._choose(self._step, scores[: self._size], scores[self._size :])
        self._step += 1
        everyone = torch.cat([chosen, chosen[self._of]])
        return torch.full_like(scores, -torch.inf).scatter_(1, everyone[:, None], 0.0)


@dataclass(frozen=True)
class Sampling:
    """How each query's tokens are drawn: `temperature` [row], 0 for the likeliest token, and `top_p` [row]."""

    temperature: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, settings: GenerationSettings, rows: int, device: torch.device) -> Sampling:
        """As the settings say, the same for all `rows`."""
        temperature = settings.temperature if settings.do_sample else 0.0
        return cls(torch.full((rows,), temperature, device=device), torch.full((rows,), settings.top_p, device=device))

    def __getitem__(self, rows: LongTensor) -> Sampling:
        return Sampling(self.temperature[rows], self.top_p[rows])


def pick(logits: Tensor, sampling: Sampling) -> LongTensor:
    """Ids [row] from `logits` [row, vocab]; draws as `model.generate` does, but with each row's own settings."""
    likeliest = logits.argmax(dim=-1)
    drawn = sampling.temperature > 0
    if not drawn.any():
        return likeliest
    scores = logits / torch.where(drawn, sampling.temperature, 1.0)[:, None]
    if (sampling.top_p < 1).any():
        ascending, order = scores.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - sampling.top_p)[:, None]
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    sampled = torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]
    return torch.where(drawn, sampled, likeliest)
