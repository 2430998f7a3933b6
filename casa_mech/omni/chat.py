"""A model's chat format, as pieces that remember what they are.

A prompt is built as a list of pieces (control tokens, the user's text, a picture's run of placeholders, the assistant's
header, a prefill). Their characters are tokenised together, exactly as the joined string would be, and every token is
then given the role of the piece it starts in. That is how masks over "the user's turn" or "the image" come about.

The format itself is read off the checkpoint's own chat template, which is rendered once with marks in place of the
turns' texts (`chat_format`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from casa_mech.errors import InputError, ModelError
from casa_mech.queries import AudioPart, ImagePart, Query, TextPart, Turn

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("control", "system", "text", "image", "audio", "assistant", "header", "prefill")
PROMPT_ROLES = ("text", "image", "audio", "header")


@dataclass(frozen=True)
class Piece:
    """A run of the prompt's characters and its role, one of `ROLES`."""

    text: str
    role: str


@dataclass(frozen=True)
class ChatFormat:
    """What stands between the texts of a conversation."""

    begin: str
    """Before everything, such as a beginning-of-text token."""
    system: tuple[str, str]
    """Before and after a system prompt; it stands in the first user turn where a model has no system turn."""
    user: tuple[str, str]
    """Before and after a user turn's text."""
    assistant: tuple[str, str]
    """Before and after an earlier reply."""
    header: str
    """After the last user turn; the model writes on from here."""
    end_of_turn: str
    """The token with which the model ends a reply."""
    default_system: str = ""
    """The system prompt of a conversation that brings none."""
    preamble: str = ""
    """In place of a system turn where a conversation has none: some templates write a turn of their own."""
    system_in_user: bool = False
    """True where the system prompt stands within the first user turn."""


@dataclass(frozen=True)
class MediaMarks:
    """How a prompt shows a picture or clip."""

    token: str
    """The placeholder, which stands as often as the encoder gives features."""
    begin: str
    """Before the placeholders."""
    end: str
    """After them."""


CHATML = ChatFormat(
    begin="",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    header="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    default_system=DEFAULT_SYSTEM,
)
"""Qwen2.5-Omni's format, for checkpoints of its kind that bring no template."""


def chat_format(tokenizer: Any, template: str | None, where: str = "this model") -> ChatFormat:
    """The format of a chat template, or `CHATML` where there is none and the tokenizer knows its tokens.

    The template is rendered with marks in place of the texts; what stands between the marks is the format. Options that
    would make a prompt depend on the day, or the model think before it answers, are set: `date_string`,
    `enable_thinking=False`.

    Args:
        tokenizer: renders the template.
        template: Jinja text; None: the tokenizer's own.
        where: the model, for errors.

    Raises:
        ModelError: no template, or one from which no format can be read.
    """
    template = template or getattr(tokenizer, "chat_template", None)
    if not template:
        vocabulary = tokenizer.get_vocab()
        if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
            return CHATML
        raise ModelError(
            f"{where} has no chat template: casa-mech studies chat models; take the instruct version, or put the "
            "template as chat_template.jinja beside the checkpoint"
        )
    rendered = _Rendered(tokenizer, template, where)
    before, unanswered = rendered.between("user")
    _, answered = rendered.between("user", header=True)
    _, to_reply, to_next, _ = rendered.between("user", "assistant", "user", header=True)
    closed = rendered.between("user", "assistant")[2]
    user_end = rendered.common(unanswered, answered)
    if user_end == answered:  # as in Mistral's, where the end of the user's turn is what the model answers to
        user_end = ""
    reply_end = rendered.common(closed, to_next)
    user_begin = to_next.removeprefix(reply_end)
    if not (before.endswith(user_begin) and to_reply.startswith(user_end)):
        raise ModelError(
            f"{where}: the chat template writes an earlier turn otherwise than the last; give a plainer one"
        )
    first = tokenizer.bos_token
    begin = first if first and before.startswith(first) and not user_begin.startswith(first) else ""
    own = before.removesuffix(user_begin).removeprefix(begin)  # what it writes where there is no system prompt
    system, in_user, default, preamble = ("", "\n\n"), True, "", own
    try:
        opening, middle, _ = rendered.between("system", "user", header=True)
    except ModelError:  # it has no system prompts
        pass
    else:
        in_user = not middle.endswith(user_begin)
        system = ("", middle) if in_user else (opening.removeprefix(begin), middle.removesuffix(user_begin))
        if not in_user and own.startswith(system[0]) and own.endswith(system[1]):
            default = own[len(system[0]) : len(own) - len(system[1])]
            preamble = "" if default else own
    reply = (to_reply.removeprefix(user_end), reply_end)
    end_of_turn = next((piece for piece in rendered.pieces(reply_end) if piece in tokenizer.all_special_tokens), "")
    if not end_of_turn:
        raise ModelError(
            f"{where}: the chat template ends a reply with no special token, so it is not known when to stop"
        )
    return ChatFormat(
        begin=begin,
        system=system,
        user=(user_begin, user_end),
        assistant=reply,
        header=answered.removeprefix(user_end),
        end_of_turn=end_of_turn,
        default_system=default,
        preamble=preamble,
        system_in_user=in_user,
    )


class _Rendered:
    """A chat template, rendered with marks for texts."""

    def __init__(self, tokenizer: Any, template: str, where: str) -> None:
        self._tokenizer, self._template, self._where = tokenizer, template, where
        tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._token = re.compile("(" + "|".join(map(re.escape, tokens)) + ")") if tokens else None

    def between(self, *roles: str, header: bool = False) -> list[str]:
        """What stands before, between and after the texts of turns of `roles`.

        Raises:
            ModelError: the template does not take such turns, or changes their texts.
        """
        marks = [f"MARK{number}KRAM" for number in range(len(roles))]
        turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        problem = "a turn's text is missing in what it renders"
        for messages in (turns, in_parts):
            try:
                text = self._tokenizer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, add_generation_prompt=header,
                    enable_thinking=False, date_string="26 Jul 2024",
                )  # fmt: skip
            except Exception as error:  # a template raises what it likes
                problem = (str(error).strip() or type(error).__name__).splitlines()[0]
                continue
            if all(text.count(mark) == 1 for mark in marks):
                return re.split("|".join(marks), text)
        raise ModelError(f"{self._where}: the chat template cannot be used ({problem}); give one with user turns")

    def pieces(self, text: str) -> list[str]:
        """`text` cut at the tokenizer's added tokens."""
        return [piece for piece in (self._token.split(text) if self._token else [text]) if piece]

    def common(self, one: str, other: str) -> str:
        """The beginning that both texts share, in whole pieces."""
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(self.pieces(one), self.pieces(other), strict=False))
        return "".join(piece for piece, _ in shared)


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


def chat_pieces(
    query: Query,
    runs: MediaRuns,
    special_tokens: Sequence[str],
    chat: ChatFormat = CHATML,
    marks: Mapping[str, MediaMarks] = MappingProxyType({}),
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
    system = chat.default_system if query.system is None else query.system
    prompt = Piece(_break_up(system, special_tokens), "system")
    before, after = (Piece(text, "control") for text in chat.system)
    pieces = [Piece(chat.begin, "control")]
    if system and not chat.system_in_user:
        pieces += [before, prompt, after]
    else:
        pieces.append(Piece(chat.preamble, "control"))
    turns = [*query.history, Turn(role="user", parts=query.parts)]
    first_user = next(index for index, turn in enumerate(turns) if turn.role == "user")
    for index, turn in enumerate(turns):
        begin, end = (Piece(text, "control") for text in (chat.user if turn.role == "user" else chat.assistant))
        inside = [prompt, after] if system and chat.system_in_user and index == first_user else []
        gate_token = Piece(gate_tokens.get(turn.safety_token or "", ""), "control")
        pieces += [begin, *inside, gate_token, *_content(turn, runs, special_tokens, marks), end]
    pieces.append(Piece(chat.header, "header"))
    if prefill and query.prefill:
        pieces.append(Piece(_break_up(query.prefill, special_tokens), "prefill"))
    return pieces


def _content(
    turn: Turn, runs: MediaRuns, special_tokens: Sequence[str], marks: Mapping[str, MediaMarks]
) -> Iterator[Piece]:
    for part in turn.parts:
        if isinstance(part, TextPart):
            yield Piece(_break_up(part.text, special_tokens), "assistant" if turn.role == "assistant" else "text")
        else:
            yield Piece(marks[part.kind].begin, "control")
            yield Piece(runs.next(part), part.kind)
            yield Piece(marks[part.kind].end, "control")


def _break_up(text: str, special_tokens: Sequence[str]) -> str:
    for token in special_tokens:
        if token in text:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text
