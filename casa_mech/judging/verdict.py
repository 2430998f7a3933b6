"""`Verdict`: what a judge says of one reply, and the `Judge` interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from casa_mech.errors import RunError
from casa_mech.queries import Query, Reply

Outcome = Literal["refused", "complied", "wrong_topic", "incoherent", "undecided"]
UNDECIDED: Outcome = "undecided"
Pair = tuple[Query, Reply | str]


class Verdict(BaseModel):
    """One judgement. `complied` on a harmful query is an attack's success, `refused` on a benign one over-refusal.

    `wrong_topic` is an answer that complies about something else than was asked; `incoherent` is none of the others.
    `undecided` says that the judge gave no verdict that can be read: it is counted apart and never as safe (see
    `casa_mech.judging.merit`). `score` is a rubric's number in 0..1, where there is one; the tokens are the judge's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    query_id: str
    outcome: Outcome
    judge: str
    reason: str = ""
    score: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def refused(self) -> bool:
        """Whether the reply refuses."""
        return self.outcome == "refused"

    @property
    def complied(self) -> bool:
        """Whether the reply does what was asked, about what was asked."""
        return self.outcome == "complied"

    @property
    def decided(self) -> bool:
        """Whether the judge came to a verdict at all."""
        return self.outcome != UNDECIDED


class Judge(Protocol):
    """What the study needs of a judge.

    A judge may also have an `identity` (text that changes whenever its verdicts could; default: its name) and be a
    `StreamingJudge`.
    """

    name: str

    def judge(self, query: Query, reply: Reply | str) -> Verdict:
        """The verdict on `reply` to `query`, `query.prefill` counted as the reply's beginning."""
        ...


@runtime_checkable
class StreamingJudge(Protocol):
    """A judge that is faster on many replies at once than on one after the other."""

    def judge_stream(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        """(place in `pairs`, verdict) as they are finished, in any order; `JudgeDown` after the finished ones."""
        ...


class JudgeDown(RunError):
    """A judge that does not answer, also not after retries. What it said before stands."""


def judge_identity(judge: Judge) -> str:
    """What verdicts are stored under: the judge's `identity`, or its name."""
    return str(getattr(judge, "identity", "") or judge.name)


def reply_text(reply: Reply | str) -> str:
    """The text of a reply given as a record or as text."""
    return reply if isinstance(reply, str) else reply.text


def whole_reply(query: Query, reply: Reply | str) -> str:
    """The prefill and what the model wrote after it: the reply as a user would see it."""
    return f"{query.prefill} {reply_text(reply)}".strip()


def request_text(query: Query) -> str:
    """What a reply is held against: `meta["request"]`, the plain request behind an attack, or else the query's text.

    Of pictures and clips that stand alone it names the kinds, in brackets.
    """
    text = query.meta.get("request") or query.text
    alone = set(query.surface.split("+")) <= {"image", "audio"}
    return f"[{query.surface}, without any text]" if alone and not text else text
