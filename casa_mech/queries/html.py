"""Queries and replies as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

from PIL import Image

from casa_mech.display import Html, clip_html, html, picture_html, text_html
from casa_mech.errors import InputError
from casa_mech.queries.media import SAMPLE_RATE, load_audio, load_image
from casa_mech.queries.refusals import find_refusal

if TYPE_CHECKING:
    import numpy as np

    from casa_mech.queries.query import AudioPart, ImagePart, Part, Query, Reply

MEDIA = 8
"""Pictures and clips that are shown of a query."""


def query_html(query: Query) -> Html:
    """The conversation by role: texts, pictures inline, clips with a player; a medium that cannot be read says so."""
    turns: list[tuple[str, str | None, list[Html]]] = []
    media = count(1)
    if query.system:
        turns.append(("system", None, [text_html(query.system)]))
    for turn in query.history:
        turns.append((turn.role, turn.safety_token, [_part(part, query.id, media) for part in turn.parts]))
    turns.append(("user", None, [_part(part, query.id, media) for part in query.parts]))
    if query.prefill:
        turns.append(("prefill", None, [text_html(query.prefill)]))
    facts = [query.id, query.label or "unlabelled", query.source, query.meta.get("attack", ""), query.surface]
    return html("query", turns=turns, facts=" · ".join(dict.fromkeys(filter(None, facts))))


def reply_html(reply: Reply) -> Html:
    """What the gate decided, the text, and whether its words are a refusal's."""
    refusal = find_refusal(reply.text)
    verdict = f"refuses by its words: “{refusal}”" if refusal else "no words of a refusal"
    facts = [reply.query_id, verdict if reply.text else "no text", f"{reply.tokens} tokens"]
    return html("reply", reply=reply, text=text_html(reply.text), facts=" · ".join(facts))


def medium_html(part: ImagePart | AudioPart, where: str, weights: np.ndarray | None = None, caption: str = "") -> Html:
    """A picture or clip, tinted by `weights`; one line where it cannot be read.

    Args:
        part: the medium.
        where: what to call it in that line, such as a query id.
        weights: [row, column] over a picture, [position] along a clip; None: nothing is tinted.
        caption: of the medium.
    """
    try:
        if part.kind == "image":
            return picture_html(load_image(part, where), weights, caption)
        return clip_html(load_audio(part, where), SAMPLE_RATE, weights, caption)
    except (InputError, Image.DecompressionBombError) as error:
        return html("problem", problem=str(error))


def _part(part: Part, query_id: str, media: Iterator[int]) -> Html:
    if part.kind == "text":
        return text_html(part.text)
    if next(media) > MEDIA:
        return html("problem", problem=f"one more medium ({part.kind}); the first {MEDIA} of a query are shown")
    return medium_html(part, f"query {query_id}")
