"""`Query` and its parts: what goes into the model; `Example` and `Reply`: what should and what did come out.

Everything is frozen: an attack returns a new query (`query.model_copy(update=...)`), it never changes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from casa_mech.errors import InputError

SCHEMA_VERSION = 1
Label = Literal["harmful", "benign"]
SafetyToken = Literal["safe", "unsafe"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")


class TextPart(_Record):
    """A run of text."""

    kind: Literal["text"] = "text"
    text: str


class ImagePart(_Record):
    """A picture: a path, a PIL image, or an array `[height, width, 3]` of uint8."""

    kind: Literal["image"] = "image"
    image: Path | Image.Image | np.ndarray


class AudioPart(_Record):
    """A clip: a path to a file soundfile reads, or an array `[samples]` or `[samples, channels]` and its rate in Hz."""

    kind: Literal["audio"] = "audio"
    audio: Path | np.ndarray
    rate: int | None = None

    @model_validator(mode="after")
    def _array_has_rate(self) -> AudioPart:
        if isinstance(self.audio, np.ndarray) and not self.rate:
            raise InputError("an audio array needs its sampling rate in hertz: AudioPart(audio=array, rate=16000)")
        return self


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="kind")]


class Turn(_Record):
    """An earlier turn of the conversation.

    `safety_token` is what a gate decided at the start of an assistant turn. The model sees it again as long as a gate
    is attached; nobody else does.
    """

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]
    safety_token: SafetyToken | None = None


class Query(_Record):
    """One request to the model.

    `parts` is the last user turn, in reading order. `history` holds the turns before it, `prefill` the opening that an
    attacker (or a user) puts into the assistant's mouth. `meta` holds what the query's maker knows of it; the keys in
    use are `topic`, `category`, `verb`, `template`, `wrapper`, `surface`, `attack`, `split` and `compliance` (the
    full text of an answer that complies, which judges and prefill attacks read).
    """

    id: str
    parts: tuple[Part, ...]
    label: Label | None = None
    source: str = "user"
    system: str | None = None
    history: tuple[Turn, ...] = ()
    prefill: str = ""
    meta: Mapping[str, str] = Field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str, id: str = "q0", **fields: Any) -> Query:
        """A query of one text part."""
        return cls(id=id, parts=(TextPart(text=text),), **fields)

    @property
    def text(self) -> str:
        """The text parts of the last user turn, joined by a space."""
        return " ".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def modalities(self) -> frozenset[str]:
        """The kinds of part in the last user turn: a subset of {"text", "image", "audio"}."""
        return frozenset(part.kind for part in self.parts)

    @property
    def surface(self) -> str:
        """What carries the request: `meta["surface"]`, else the kinds of part joined, as in "image+text"."""
        return self.meta.get("surface") or "+".join(sorted(self.modalities))

    def follow_up(self, reply: Reply, text: str, id: str | None = None) -> Query:
        """The next turn of the conversation: this query and `reply` become history, `text` is what the user says now.

        The reply's safety token goes along, so that a gated model sees every turn of its own as it wrote it.
        """
        said = (TextPart(text=f"{self.prefill} {reply.text}".strip()),)
        turns = (
            Turn(role="user", parts=self.parts),
            Turn(role="assistant", parts=said, safety_token=reply.safety_token),
        )
        fields = {"label": self.label, "source": self.source, "system": self.system, "history": self.history + turns}
        return Query.from_text(text, id=id or f"{self.id}+", **fields)


class Example(_Record):
    """A query with the reply it should get: one row of a training set."""

    query: Query
    reply: str


class Reply(_Record):
    """What a system answered.

    `text` never shows the safety token. `safety_token`, `v_s` and the two logits (as rewritten by the gate) are None
    for a system without a gate. `attention` holds safety attention's weight for each prompt position, on request.
    `seconds` is the query's share of its batch's time.
    """

    query_id: str
    text: str
    safety_token: SafetyToken | None = None
    v_s: float | None = None
    logit_safe: float | None = None
    logit_unsafe: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    attention: tuple[float, ...] | None = None
