"""A word as a picture: one letter in each 28-pixel cell, drawn with Pillow's built-in font (no font file is needed).

28 pixels is what one image token of Qwen2.5-Omni covers (two patches of 14), so a letter never straddles two tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from casa_mech.errors import InputError

CELL = 28


@dataclass(frozen=True)
class RenderSettings:
    """Bounds of the draws that make a word's picture. Ranges are inclusive."""

    font_sizes: tuple[int, int] = (17, 23)
    """Bounds in pixels."""
    jitter: int = 3
    """Pixels by which a letter may be moved in its cell, either way."""
    noise: float = 6.0
    """Standard deviation of a pixel's noise, of 255."""
    min_contrast: float = 90.0
    """Least distance in luminance between ink and background, of 255."""
    min_cells: int = 2
    """Cells that a picture has at least."""


@lru_cache(maxsize=4096)
def _glyph(letter: str, size: int) -> np.ndarray:
    """The letter's ink, cropped to its bounding box above the line and below: float32 `[height, width]` in 0..1."""
    font = ImageFont.load_default(size=size)
    canvas = Image.new("L", (2 * CELL, 2 * CELL), 0)
    ImageDraw.Draw(canvas).text((CELL // 2, CELL // 2), letter, font=font, fill=255)
    box = canvas.getbbox()
    if box is None:
        return np.zeros((1, 1), dtype=np.float32)
    ink = np.asarray(canvas, dtype=np.float32)[box[1] : box[3], box[0] : box[2]] / 255
    ink = ink[:CELL, :CELL].copy()
    ink.setflags(write=False)
    return ink


def _colours(rng: np.random.Generator, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Ink and background `[3]` in 0-255, apart by `contrast` in luminance; half of the draws are light on dark."""
    weights = np.array([0.299, 0.587, 0.114])
    while True:
        pair = rng.uniform(0, 255, size=(2, 3))
        if abs(float(weights @ (pair[0] - pair[1]))) >= contrast:
            return pair[0], pair[1]


@dataclass(frozen=True)
class Style:
    """Font size and colours of one picture."""

    size: int
    """Of the font, in pixels."""
    front: tuple[float, ...]
    """The ink's colour `[3]` in 0-255."""
    back: tuple[float, ...]
    """The background's colour `[3]` in 0-255."""


def draw_style(rng: np.random.Generator, settings: RenderSettings = RenderSettings()) -> Style:
    """A size and a pair of colours, drawn before any word is known, so that words of any length can share them."""
    size = int(rng.integers(settings.font_sizes[0], settings.font_sizes[1] + 1))
    front, back = _colours(rng, settings.min_contrast)
    return Style(size, tuple(front.tolist()), tuple(back.tolist()))


def render_word(
    word: str,
    rng: np.random.Generator | int = 0,
    settings: RenderSettings = RenderSettings(),
    style: Style | None = None,
) -> Image.Image:
    """`word` as an RGB strip of height 28 and width 28 a letter (two cells at least).

    One font size and one pair of colours a word, those of `style` if given; every letter is moved a little within its
    cell. Spaces leave a cell empty. InputError when there is nothing to draw.
    """
    if not word.strip() or not word.isprintable():
        raise InputError(f"there is nothing to draw in {word!r}: give a word of printable letters")
    rng = rng if isinstance(rng, np.random.Generator) else np.random.default_rng(rng)
    cells = max(len(word), settings.min_cells)
    size = style.size if style else int(rng.integers(settings.font_sizes[0], settings.font_sizes[1] + 1))
    moves = rng.integers(-settings.jitter, settings.jitter + 1, size=(len(word), 2))
    ink = np.zeros((CELL, CELL * cells), dtype=np.float32)
    for index, (letter, (down, right)) in enumerate(zip(word, moves, strict=True)):
        glyph = _glyph(letter, size)
        height, width = glyph.shape
        # Centred, then moved; clipped so that no letter leaves its cell.
        top = int(np.clip((CELL - height) // 2 + down, 0, CELL - height))
        left = int(np.clip((CELL - width) // 2 + right, 0, CELL - width)) + CELL * index
        ink[top : top + height, left : left + width] = glyph
    if style:
        front, back = np.array(style.front), np.array(style.back)
    else:
        front, back = _colours(rng, settings.min_contrast)
    pixels = back + ink[..., None] * (front - back)
    if settings.noise > 0:
        pixels = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * settings.noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
