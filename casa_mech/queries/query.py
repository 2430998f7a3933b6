"""`Query` and its parts go into the model; an `Example` says what should come out of it, a `Reply` what did.

Everything is frozen: an attack returns a new query (`query.model_copy(update=...)`), it never changes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from casa_mech.errors import InputError
from casa_mech.identity import digest_of
from casa_mech.queries.labels import Label as Label
from casa_mech.queries.labels import label_of

SCHEMA_VERSION = 1
SafetyToken = Literal["safe", "unsafe"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")

    if not TYPE_CHECKING:  # type checkers read the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise InputError(f"{type(self).__name__}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    """One line that names the field."""
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
        return str(cause)
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].splitlines()[0]}"


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
    """An earlier turn of the conversation."""

    role: Literal["user", "assistant"]
    """Whose it is."""
    parts: tuple[Part, ...]
    """Its content, in reading order."""
    safety_token: SafetyToken | None = None
    """A gate's decision at the start of an assistant turn. The model sees it again as long as a gate is attached;
    nobody else does."""


class Query(_Record):
    """One request to the model. Text, pictures and clips may each stand alone."""

    id: str
    """Names it in errors and tables; an attack keeps it."""
    parts: tuple[Part, ...]
    """The last user turn, in reading order."""
    label: Label | None = None
    """Harmful or benign, also by the other names that `casa_mech.queries.labels.label_of` knows; None: not known."""
    source: str = "user"
    """The set or file that it is from."""
    system: str | None = None
    """The system prompt; None: the model's own default."""
    history: tuple[Turn, ...] = ()
    """The turns before the last user turn."""
    prefill: str = ""
    """The opening that an attacker (or a user) puts into the assistant's mouth."""
    meta: Mapping[str, str] = Field(default_factory=dict)
    """Facts that the query's maker knows of it. Keys in use: `topic`, `category`, `verb`, `template`, `wrapper`,
    `surface`, `attack`, `split`, `request` (the plain request, where the text is another one) and `compliance` (the
    full text of an answer that complies, which judges and prefill attacks read)."""

    @classmethod
    def from_text(cls, text: str, id: str = "", **fields: Any) -> Query:
        """A query of one text part; without an `id` it is named by a digest of the text."""
        return cls(id=id or f"text-{digest_of(text)[:8]}", parts=(TextPart(text=text),), **fields)

    @field_validator("label", mode="before")
    @classmethod
    def _label_by_any_name(cls, value: object) -> Label | None:
        return label_of(value)

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
        """The carrier of the request: `meta["surface"]`, else the kinds of part joined, as in "image+text"."""
        return self.meta.get("surface") or "+".join(sorted(self.modalities))

    def follow_up(self, reply: Reply, text: str, id: str | None = None) -> Query:
        """The next turn of the conversation: this query and `reply` become history, `text` is what the user says now.

        The reply's safety token goes along, so that a gated model sees every turn of its own as it wrote it.
        """
        answer = (TextPart(text=f"{self.prefill} {reply.text}".strip()),)
        turns = (
            Turn(role="user", parts=self.parts),
            Turn(role="assistant", parts=answer, safety_token=reply.safety_token),
        )
        fields = {"label": self.label, "source": self.source, "system": self.system, "history": self.history + turns}
        return Query.from_text(text, id=id or f"{self.id}+", **fields)

    def _repr_html_(self) -> str:
        from casa_mech.queries.html import query_html

        return query_html(self)


class Example(_Record):
    """One row of a training set."""

    query: Query
    reply: str
    """The reply that the query should get."""


class Reply(_Record):
    """A system's answer to one query; what a gate decides is None for a system without one."""

    query_id: str
    text: str
    """The reply, without the safety token and the prefill."""
    safety_token: SafetyToken | None = None
    """The gate's decision."""
    v_s: float | None = None
    """Safety attention's probability that the request is unsafe, in 0..1."""
    logit_safe: float | None = None
    """The safe token's logit, as rewritten by the gate."""
    logit_unsafe: float | None = None
    """The unsafe token's, likewise."""
    raw_logit_safe: float | None = None
    """The safe token's logit as the language model gives it, before the gate rewrites it."""
    raw_logit_unsafe: float | None = None
    """The unsafe token's, likewise."""
    tokens: int = 0
    """Tokens generated, up to the end of the turn."""
    seconds: float = 0.0
    """The query's share of its batch's time."""
    attention: tuple[float, ...] | None = Field(default=None, repr=False)
    """Safety attention's weight for each prompt position, on request."""

    def _repr_html_(self) -> str:
        from casa_mech.queries.html import reply_html

        return reply_html(self)
