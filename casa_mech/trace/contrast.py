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
    """Queries and, as further rows of the same batch, second prompts."""

    batch: OmniBatch
    """The queries, then the second prompts; the queries alone where `start` is given."""
    queries: Sequence[Query]
    """The queries."""
    of: LongTensor
    """[second]: the row of the query that each second prompt belongs to."""
    start: Start | None = None
    """Inputs to decode from where the prompts were read before; None: the batch's."""

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
    """The continuations of two-branch decoding."""

    new: LongTensor
    """Ids [row, new position] of the queries alone, end-of-turn and padding included."""
    cache: Any
    """Keys and values of all rows, second prompts included."""


def branched(omni: Omni, queries: Sequence[Query], seconds: Sequence[Query | None]) -> Branches:
    """`queries` and their second prompts as one left-padded batch; None for a query that has no second prompt."""
    of = [row for row, second in enumerate(seconds) if second is not None]
    batch = omni.encode([*queries, *(second for second in seconds if second is not None)])
    return Branches(batch, queries, torch.tensor(of, dtype=torch.long, device=omni.device))


def reworded_branches(omni: Omni, queries: Sequence[Query], reworded: Sequence[Query]) -> Branches:
    """Each of `queries` beside itself in other words, about the same media.

    Pictures and clips are encoded and read once, if they come before the text that differs.
    """
    plain = read_prompts(omni, omni.encode(queries))
    if any(query.modalities - {"text"} for query in queries):
        second = read_prompts(omni, plain.batch, beside(omni, plain, reworded))
    else:
        second = read_prompts(omni, omni.encode(reworded))
    start = resumed(omni, joined(omni, plain, second))
    return Branches(plain.batch, queries, torch.arange(len(queries), device=omni.device), start)


def decode_branches(omni: Omni, branches: Branches, choose: Choose, max_new_tokens: int) -> Decoded:
    """Decode with `choose` at every step, until each query has ended or has `max_new_tokens`.

    Raises:
        ModelError: logits that are not finite; it names the query.
    """
    start = branches.batch.inputs if branches.start is None else branches.start
    processor = LogitsProcessorList([_OneToken(choose, branches.queries, branches.of)])
    output = omni.model.generate(
        **start,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=processor,
        return_dict_in_generate=True,
    )
    width = start["input_ids"].shape[1]
    return Decoded(output.sequences[: branches.size, width:], output.past_key_values)


def continue_alone(
    omni: Omni, branches: Branches, decoded: Decoded, choose: Choose, rows: Sequence[int], max_new_tokens: int
) -> LongTensor:
    """Decode on from `decoded` without the second prompts, whose cache is let go; ids [row, new position] of `rows`.

    `choose` sees the steps from 0 again, the logits of `rows` in their order, and no second logits.
    """
    no_seconds = torch.empty(0, dtype=torch.long, device=omni.device)
    processor = LogitsProcessorList([_OneToken(choose, [branches.queries[row] for row in rows], no_seconds)])
    kwargs: dict[str, object] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "logits_processor": processor,
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
        ids = self._choose(self._step, scores[: self._size], scores[self._size :])
        self._step += 1
        ids = torch.cat([ids, ids[self._of]])
        return torch.full_like(scores, -torch.inf).scatter_(1, ids[:, None], 0.0)


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, row by row."""

    temperature: Tensor
    """[row]: softmax temperature; 0 takes the likeliest token."""
    top_p: Tensor
    """[row]: nucleus mass."""

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
