"""Who tells SafeCoDe whether a query is unsafe: the model itself, a judge, or CASA's own v_s (method notes §2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from casa_mech.defenses.prompts import defense_text, with_text_after, with_text_before
from casa_mech.identity import digest_of
from casa_mech.judging import Judge
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.omni.finite import finite_logits
from casa_mech.queries import Query
from casa_mech.trace.fork import ReadPrompts, beside

JUDGED_REPLY = "Sure, here is all that you asked for, step by step, as you wanted it."


class VerdictOf(Protocol):
    """Any callable that judges queries; it may also have `identity` (text that changes whenever its verdicts could) and
    `forwards` (of the model under study for each query)."""

    def __call__(self, queries: Sequence[Query]) -> list[bool | None]:
        """For each query True (unsafe), False (safe) or None (no verdict could be read, which counts as safe)."""
        ...


@dataclass(frozen=True)
class ModelVerdict:
    """The model's own yes or no to `question` (None: the package's), which is put after the request and its media."""

    omni: Omni
    question: str | None = None
    batch_size: int = 16
    forwards: ClassVar[float] = 4.0

    @property
    def identity(self) -> str:
        """The question."""
        return f"model: {self._asked}"

    @property
    def _asked(self) -> str:
        return defense_text(self.omni, "verdict") if self.question is None else self.question

    def __call__(self, queries: Sequence[Query]) -> list[bool | None]:
        """Its verdicts."""
        settings = GenerationSettings(max_new_tokens=int(self.forwards), batch_size=self.batch_size)
        asked = self._asked
        replies = self.omni.generate([with_text_after(query, asked) for query in queries], settings)
        return [read_answer(reply.text) for reply in replies]

    def on_read(self, read: ReadPrompts, queries: Sequence[Query]) -> list[bool | None]:
        """Its verdicts on queries whose prompts are the first rows of `read`: only the question is read besides."""
        asked = self._asked
        start = beside(self.omni, read, [with_text_after(query, asked) for query in queries])
        ids = self.omni.model.generate(
            **start, max_new_tokens=int(self.forwards), do_sample=False, logits_processor=finite_logits(queries)
        )
        new = ids[:, start["input_ids"].shape[1] :].tolist()
        return [read_answer(self.omni.decode(self.omni.until_end(row))) for row in new]


def read_answer(text: str) -> bool | None:
    """Whether an answer says yes or no, or unsafe or safe, as its first word; None where it says neither."""
    first = re.match(r"\W*(\w+)", text.lower())
    return {"yes": True, "unsafe": True, "no": False, "safe": False}.get(first.group(1)) if first else None


@dataclass(frozen=True)
class JudgeVerdict:
    """A judge's verdict, for judges that ask whether a reply is harmful (such as one behind an API).

    The judge is shown a reply that only says it complies; the query is unsafe if that counts as harmful. It sees no
    prefill and nothing of what the query's maker knows of the request behind an attack. With `describe` (such as
    `Moras.contexts`), it gets a caption of the query's media before the text, as in the paper.
    """

    judge: Judge
    describe: Callable[[Sequence[Query]], list[str]] | None = None
    forwards: ClassVar[float] = 0.0

    @property
    def identity(self) -> str:
        """The judge's, and whether it sees captions."""
        return f"judge: {getattr(self.judge, 'identity', '') or self.judge.name}, captions: {self.describe is not None}"

    def __call__(self, queries: Sequence[Query]) -> list[bool | None]:
        """Its verdicts, one query after the other."""
        captions = self.describe(queries) if self.describe is not None else [""] * len(queries)
        return [self._one(with_text_before(*pair)) for pair in zip(queries, captions, strict=True)]

    def _one(self, query: Query) -> bool | None:
        meta = {key: value for key, value in query.meta.items() if key != "request"}
        found = self.judge.judge(query.model_copy(update={"meta": meta, "prefill": ""}), JUDGED_REPLY)
        return found.complied if getattr(found, "decided", True) else None


@dataclass(frozen=True)
class CasaVerdict:
    """v_s of the CASA gate saved at `path`, unsafe from `threshold` on.

    The gate is on `omni` only while it is asked, so the replies are the base model's.
    """

    path: Path
    omni: Omni
    threshold: float = 0.5
    batch_size: int = 16
    forwards: ClassVar[float] = 1.0

    @property
    def identity(self) -> str:
        """A digest of the saved gate, and the threshold."""
        files = sorted(self.path.glob("*.safetensors"))
        digest = digest_of(piece for file in files for piece in (file.name, file.read_bytes()))
        return f"casa: {digest} from {self.threshold}"

    def __call__(self, queries: Sequence[Query]) -> list[bool | None]:
        """Its verdicts; the gate is put on and taken off again."""
        from casa_mech.casa import Casa

        casa = Casa.from_pretrained(self.path, self.omni)
        try:
            readings = casa.decide(queries, GenerationSettings(batch_size=self.batch_size))
        finally:
            casa.detach()
        return [None if reading.v_s is None else reading.v_s >= self.threshold for reading in readings]
