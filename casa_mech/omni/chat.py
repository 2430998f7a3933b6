"""Qwen2.5-Omni's chat format, as pieces that remember what they are.

A prompt is built as a list of pieces (control tokens, the user's text, a picture's run of placeholders, the assistant's
header, a prefill). Their characters are tokenised together, exactly as the joined string would be, and every token is
then given the role of the piece it starts in. That is how masks over "the user's turn" or "the image" come about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from casa_mech.errors import InputError
from casa_mech.queries import AudioPart, ImagePart, Query, TextPart, Turn

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("control", "system", "text", "image", "audio", "assistant", "header", "prefill")
MEDIA_MARKS = {"image": ("<|vision_bos|>", "<|vision_eos|>"), "audio": ("<|audio_bos|>", "<|audio_eos|>")}
PROMPT_ROLES = ("text", "image", "audio", "header")


@dataclass(frozen=True)
class Piece:
    """A run of the prompt's characters and its role, one of `ROLES`."""

    text: str
    role: str


class MediaRuns:
    """The placeholder runs of pictures and clips, taken one by one in reading order."""

    def __init__(self, images: list[str], audio: list[str]) -> None:
        self._images, self._audio = iter(images), iter(audio)

    def next(self, part: ImagePart | AudioPart) -> str:
        """The run of the next picture or clip, by the kind of `part`."""
        return next(self._images) if isinstance(part, ImagePart) else next(self._audio)


def media_parts(query: Query) -> Iterator[ImagePart | AudioPart]:
    """All pictures and clips of `query`, those of earlier turns first."""
    for parts in [turn.parts for turn in query.history] + [query.parts]:
        for part in parts:
            if not isinstance(part, TextPart):
                yield part


def default_system(chat_template: str | None) -> str:
    """The system prompt a query gets that brings none: Qwen's, unless the checkpoint's own chat template has none."""
    return DEFAULT_SYSTEM if not chat_template or DEFAULT_SYSTEM in chat_template else ""


def chat_pieces(
    query: Query,
    runs: MediaRuns,
    special_tokens: list[str],
    system: str = DEFAULT_SYSTEM,
    prefill: bool = True,
    gate_tokens: Mapping[str, str] = MappingProxyType({}),
) -> list[Piece]:
    """The pieces of `query` up to and including the assistant's header and, if asked for, the prefill.

    `gate_tokens` are the strings of an attached gate's safety tokens by their names; with them, earlier assistant
    turns begin with the token that was decided for them.

    A special token's string inside text the user wrote is broken up, so that no prompt can forge a turn, a picture or
    a safety token.

    Raises:
        InputError: the last user turn has no content.
    """
    if not any(not isinstance(part, TextPart) or part.text.strip() for part in query.parts):
        raise InputError(f"query {query.id}: the prompt is empty; give it text, an image or audio")
    pieces: list[Piece] = []
    system = system if query.system is None else query.system
    if system:
        pieces += [
            Piece("<|im_start|>system\n", "control"),
            Piece(_break_up(system, special_tokens), "system"),
            Piece("<|im_end|>\n", "control"),
        ]
    for turn in query.history:
        pieces += _turn(turn, runs, special_tokens, gate_tokens.get(turn.safety_token or "", ""))
    pieces += _turn(Turn(role="user", parts=query.parts), runs, special_tokens)
    pieces.append(Piece("<|im_start|>assistant\n", "header"))
    if prefill and query.prefill:
        pieces.append(Piece(_break_up(query.prefill, special_tokens), "prefill"))
    return pieces


def _turn(turn: Turn, runs: MediaRuns, special_tokens: list[str], gate_token: str = "") -> list[Piece]:
    pieces = [Piece(f"<|im_start|>{turn.role}\n", "control"), Piece(gate_token, "control")]
    for part in turn.parts:
        if isinstance(part, TextPart):
            role = "assistant" if turn.role == "assistant" else "text"
            pieces.append(Piece(_break_up(part.text, special_tokens), role))
        else:
            begin, end = MEDIA_MARKS[part.kind]
            pieces += [Piece(begin, "control"), Piece(runs.next(part), part.kind), Piece(end, "control")]
    pieces.append(Piece("<|im_end|>\n", "control"))
    return pieces


def _break_up(text: str, special_tokens: list[str]) -> str:
    for token in special_tokens:
        if token in text:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text
