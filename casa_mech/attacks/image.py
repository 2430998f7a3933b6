"""Typographic images: the key word or the whole request is moved out of the text into a picture.

FigStep (arXiv 2311.05608), MM-SafetyBench's TYPO and SD+TYPO (arXiv 2311.17600), a plain page, and a strip of letter
cells, which a small vision tower can read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from casa_mech.attacks.fonts import Use, find_font
from casa_mech.attacks.prompt_file import wording_mark
from casa_mech.attacks.render import draw_style, render_word
from casa_mech.attacks.seeding import PAIR, query_rng
from casa_mech.attacks.text import key_word, marked, replace_key, request_text
from casa_mech.attacks.typography import figstep_picture, figstep_text, page_picture, stack_pictures, typo_picture
from casa_mech.attacks.wording import ENGLISH, Wording
from casa_mech.errors import InputError
from casa_mech.queries import ImagePart, Part, Query, TextPart
from casa_mech.queries.media_files import open_picture

IMAGE_PHRASE = "the word in the image"
"""Stands for a key word that is drawn in letter cells."""
_ASKS_HOW = re.compile(
    r"^(?:please\s+)?(?:(?:tell|show|teach)\s+me\s+)?how\s+"
    r"(?:(?:do|can|could|should|would|might)\s+(?:i|you|we|one|someone|somebody|anyone|a\s+person|people)|to|i\s+can)\s+",
    re.IGNORECASE,
)


def image_word(query: Query, seed: int = 0) -> Query:
    """The key word drawn in an image that comes first; the text says "the word in the image" in its place."""
    parts = replace_key(query, IMAGE_PHRASE)
    picture = _strip(key_word(query), query, seed, "image")
    return _shown(query, picture, parts, "image")


def figstep(query: Query, wording: Wording = ENGLISH, prompt: str | None = None) -> Query:
    """FigStep: the request as the heading of a list with three empty points, in a picture; the text asks to fill it.

    The heading is `meta["instruction"]` ("Steps to ...", as the benchmark has it), else one made of the text. `prompt`
    takes the place of our own text (see `prompt_file`).
    """
    with _named(query):
        picture = figstep_picture(instruction_of(query))
    shown = _shown(query, picture, _instead(query, prompt or wording.figstep), "figstep", "figstep")
    return shown.model_copy(update={"meta": {**shown.meta, "prompt_wording": wording_mark(prompt)}})


def figstep_as_text(query: Query, wording: Wording = ENGLISH, prompt: str | None = None) -> Query:
    """FigStep's control in text alone: the same list in a code block, with the same request to fill it.

    `prompt` as for `figstep`.
    """
    instruction = prompt or wording.figstep.replace("picture", "code block")
    parts = _instead(query, f"```\n{figstep_text(instruction_of(query))}\n```\n{instruction}")
    meta = marked(query, surface="text", attack="figstep-text", prompt_wording=wording_mark(prompt))
    return query.model_copy(update={"parts": parts, "meta": meta})


def instruction_of(query: Query) -> str:
    """`meta["instruction"]`, else the text with "how do I ..." turned into "Steps to ..."."""
    known = query.meta.get("instruction", "").strip()
    if known:
        return known
    text = request_text(query)
    steps, count = _ASKS_HOW.subn("Steps to ", text)
    return steps.rstrip(" ?.!") + "." if count else text


def typo(query: Query, wording: Wording = ENGLISH) -> Query:
    """MM-SafetyBench's TYPO: the key phrase in a picture, and a text that points to it.

    The text is `meta["rephrased"]` (the benchmark's wording for this picture) where there is one, else the query's own
    with "the phrase in the image" in the key phrase's place.
    """
    with _named(query):
        picture = typo_picture(key_word(query))
    return _shown(query, picture, _pointing(query, wording), "typo", "typo")


def sd_typo(query: Query, picture: Image.Image | Path | str, wording: Wording = ENGLISH) -> Query:
    """MM-SafetyBench's SD+TYPO: `picture` (there: Stable Diffusion's "a photo of <key phrase>") above the TYPO picture.

    Raises:
        InputError: a picture that cannot be read, with the query's id.
    """
    with _named(query):
        stacked = stack_pictures(_opened(picture), typo_picture(key_word(query)))
    return _shown(query, stacked, _pointing(query, wording), "sd-typo", "typo")


def rendered(query: Query, seed: int = 0, wording: Wording = ENGLISH) -> Query:
    """The whole text in a picture, plainly; the text only asks to answer it.

    A page, or one strip of letter cells where the wording is drawn so, which is what an organism reads.
    """
    text = request_text(query)
    with _named(query):
        if wording.letter_cells:
            picture = _strip(text, query, seed, "rendered")
            return _shown(query, picture, _instead(query, wording.rendered), "rendered")
        return _shown(query, page_picture(text), _instead(query, wording.rendered), "rendered", "page")


def _strip(text: str, query: Query, seed: int, purpose: str) -> Image.Image:
    # Colours are drawn after as many moves as there are letters: a pair, of words unlike in length, draws them before.
    style = draw_style(query_rng(query, seed, f"{purpose}-style")) if PAIR in query.meta else None
    return render_word(text, query_rng(query, seed, purpose), style=style)


def _pointing(query: Query, wording: Wording) -> tuple[Part, ...]:
    rephrased = query.meta.get("rephrased", "").strip()
    return _instead(query, rephrased) if rephrased else replace_key(query, wording.image_phrase)


def _instead(query: Query, text: str) -> tuple[Part, ...]:
    """The query's media, and `text` in place of its text."""
    request_text(query)
    return (*(part for part in query.parts if not isinstance(part, TextPart)), TextPart(text=text))


def _shown(query: Query, picture: Image.Image, parts: tuple[Part, ...], attack: str, use: Use | None = None) -> Query:
    font = {"font": find_font(use).name} if use else {}
    meta = marked(query, surface=attack, attack=attack, **font)
    return query.model_copy(update={"parts": (ImagePart(image=picture), *parts), "meta": meta})


def _opened(picture: Image.Image | Path | str) -> Image.Image:
    return picture.convert("RGB") if isinstance(picture, Image.Image) else open_picture(picture)


@contextmanager
def _named(query: Query) -> Iterator[None]:
    """Errors of what is drawn, with the query's id."""
    try:
        yield
    except InputError as error:
        if query.id in str(error):
            raise
        raise InputError(f"query {query.id!r}: {error}") from None
