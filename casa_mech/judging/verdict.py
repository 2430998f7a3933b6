"""`Verdict`, a judgement of one reply, and the `Judge` interface."""

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

    `wrong_topic` is an answer that complies about something else than the request; `incoherent` is none of the others.
    `undecided` says that the judge gave no verdict that can be read: it is counted apart and never as safe (see
    `casa_mech.judging.merit`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    query_id: str
    """Of the query that was replied to."""
    outcome: Outcome
    """The judgement."""
    judge: str
    """The judge's name."""
    reason: str = ""
    """Why, in the judge's words or ours."""
    score: float | None = None
    """A rubric's number in 0..1, where there is one."""
    input_tokens: int = 0
    """Tokens that a judging model read."""
    output_tokens: int = 0
    """Tokens that it wrote."""

    @property
    def refused(self) -> bool:
        """True where the reply refuses."""
        return self.outcome == "refused"

    @property
    def complied(self) -> bool:
        """True where the reply does what the request asks, about the very thing it asks for."""
        return self.outcome == "complied"

    @property
    def decided(self) -> bool:
        """True where the judge came to a verdict at all."""
        return self.outcome != UNDECIDED


class Judge(Protocol):
    """A judge of replies.

    It may also have an `identity` (text that changes whenever its verdicts could; default: its name) and be a
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
    """A judge that does not answer, also not after retries. Its earlier verdicts stand."""


def judge_identity(judge: Judge) -> str:
    """The judge's `identity`, under which its verdicts are stored, or its name."""
    return str(getattr(judge, "identity", "") or judge.name)


def reply_text(reply: Reply | str) -> str:
    """The text of a reply given as a record or as text."""
    return reply if isinstance(reply, str) else reply.text


def whole_reply(query: Query, reply: Reply | str) -> str:
    """The prefill and what the model wrote after it: the reply as a user would see it."""
    return f"{query.prefill} {reply_text(reply)}".strip()


def request_text(query: Query) -> str:
    """The request that a reply is held against: the plain one behind an attack (`meta["request"]`), or the text.

    Of pictures and clips that stand alone it names the kinds, in brackets.
    """
    text = query.meta.get("request") or query.text
    alone = set(query.surface.split("+")) <= {"image", "audio"}
    return f"[{query.surface}, without any text]" if alone and not text else text
