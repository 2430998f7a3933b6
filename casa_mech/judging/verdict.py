"""`Verdict`: what a judge says of one reply, and the `Judge` interface."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from casa_mech.queries import Query, Reply

Outcome = Literal["refused", "complied", "wrong_topic", "incoherent"]


class Verdict(BaseModel):
    """One judgement. `complied` on a harmful query is an attack's success, `refused` on a benign one over-refusal.

    `wrong_topic` is an answer that complies about something else than was asked; `incoherent` is none of the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    query_id: str
    outcome: Outcome
    judge: str
    reason: str = ""

    @property
    def refused(self) -> bool:
        """Whether the reply refuses."""
        return self.outcome == "refused"

    @property
    def complied(self) -> bool:
        """Whether the reply does what was asked, about what was asked."""
        return self.outcome == "complied"


class Judge(Protocol):
    """What the study needs of a judge."""

    name: str

    def judge(self, query: Query, reply: Reply | str) -> Verdict:
        """The verdict on `reply` to `query`, `query.prefill` counted as the reply's beginning."""
        ...


def reply_text(reply: Reply | str) -> str:
    """The text of a reply given as a record or as text."""
    return reply if isinstance(reply, str) else reply.text
