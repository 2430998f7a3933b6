"""Typographic images: the key word is moved out of the text into a picture (FigStep's idea, arXiv 2311.05608)."""

from __future__ import annotations

from casa_mech.attacks.render import RenderSettings, render_word
from casa_mech.attacks.seeding import query_rng
from casa_mech.attacks.text import key_word, marked, replace_key
from casa_mech.queries import ImagePart, Query

IMAGE_PHRASE = "the word in the image"


def image_word(query: Query, seed: int = 0, settings: RenderSettings = RenderSettings()) -> Query:
    """The key word drawn in an image that comes first; the text says "the word in the image" in its place."""
    parts = replace_key(query, IMAGE_PHRASE)
    picture = render_word(key_word(query), query_rng(query, seed, "image"), settings)
    meta = marked(query, surface="image", attack="image")
    return query.model_copy(update={"parts": (ImagePart(image=picture), *parts), "meta": meta})
