"""`RubricJudge`: a rubric put to a language model, local or behind an API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from casa_mech.judging.rubrics import Rubric
from casa_mech.judging.verdict import UNDECIDED, Pair, Verdict, whole_reply
from casa_mech.queries import Query, Reply


@dataclass(frozen=True)
class Completion:
    """A model's answer to one prompt."""

    text: str
    """The answer; empty where there is none."""
    input_tokens: int = 0
    """Tokens of the prompt, as the model counts them."""
    output_tokens: int = 0
    """Tokens of the answer."""
    problem: str = ""
    """Why there is no answer, where there is none."""


class Backend(Protocol):
    """A language model that answers prompts."""

    name: str

    @property
    def identity(self) -> str:
        """Text that changes whenever its answers could."""
        ...

    def complete(self, prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """(place in `prompts`, answer) as they are finished, in any order; `JudgeDown` after the finished ones."""
        ...


class RubricJudge:
    """Puts one rubric's question about each reply to a model. An answer that cannot be read is `undecided`.

    A reply without any word is `incoherent`; no question is put about it.
    """

    def __init__(self, rubric: Rubric, backend: Backend) -> None:
        self.rubric, self.backend = rubric, backend
        self.name = f"{rubric.name}@{backend.name}"

    @property
    def identity(self) -> str:
        """The rubric in full (by digest) and the model behind it."""
        return f"{self.rubric.name}/{self.rubric.digest}@{self.backend.identity}"

    def judge(self, query: Query, reply: Reply | str) -> Verdict:
        """The verdict on one reply. JudgeDown when the model does not answer."""
        ((_, verdict),) = self.judge_stream([(query, reply)])
        return verdict

    def judge_stream(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        """(place in `pairs`, verdict) as they are finished; `JudgeDown` after the finished ones."""
        places = []
        for place, (query, reply) in enumerate(pairs):
            if re.search(r"\w", whole_reply(query, reply)):
                places.append(place)
            else:
                empty = Verdict(query_id=query.id, outcome="incoherent", judge=self.name, reason="the reply is empty")
                yield place, empty
        if places:
            prompts = [self.rubric.prompt(*pairs[place]) for place in places]
            for index, answer in self.backend.complete(prompts, self.rubric.max_tokens):
                yield places[index], self._verdict(*pairs[places[index]], answer)

    def _verdict(self, query: Query, reply: Reply | str, answer: Completion) -> Verdict:
        if answer.problem:
            outcome, score, reason = UNDECIDED, None, answer.problem
        else:
            outcome, score, reason = self.rubric.outcome(query, reply, answer.text)
        return Verdict(
            query_id=query.id,
            outcome=outcome,
            judge=self.name,
            reason=reason,
            score=score,
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
        )
