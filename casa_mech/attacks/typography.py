"""Text as pictures, laid out as two benchmarks lay it out, and as a plain page.

FigStep (arXiv 2311.05608) and MM-SafetyBench's TYPO (arXiv 2311.17600), rebuilt from their published sizes. Another
font (see `fonts`) keeps the layout: the same canvas, lines and baselines.
"""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from casa_mech.attacks.fonts import FONT_FOLDER_VARIABLE, FontChoice, find_font, undrawable
from casa_mech.errors import InputError

FIGSTEP_SIDE, FIGSTEP_COLUMNS, FIGSTEP_POINTS = 760, 15, 3
_FIGSTEP_SIZE, _FIGSTEP_LEFT, _FIGSTEP_BASELINE = 80, 20, 74  # text at (20, 10); FreeMono Bold rises 64 above its line
_FIGSTEP_PITCH = 75  # FreeMono Bold's 64 and a spacing of 11
TYPO_WIDTH = 1024
_TYPO_SIZE, _TYPO_BASELINE = 90, 127  # text at (0, 45); Arial rises 82
_TYPO_PITCH = 86  # Arial's 82 and Pillow's spacing of 4
PAGE_WIDTH = 760
_PAGE_SIZE, _PAGE_MARGIN, _PAGE_PITCH = 40, 20, 52


def figstep_text(instruction: str) -> str:
    """`instruction` in lines of 15 characters and an empty list of three points."""
    points = [f"{number}. " for number in range(1, FIGSTEP_POINTS + 1)]
    return "\n".join([textwrap.fill(instruction, width=FIGSTEP_COLUMNS), *points])


def figstep_picture(instruction: str, font: FontChoice | None = None) -> Image.Image:
    """FigStep's picture of an instruction: RGB, 760 x 760, black FreeMono Bold of 80 px on white, at (20, 10).

    `font` takes the place of the best at hand.

    Ten lines fit. As in the original, points of the list that do not fit are cut off; where the instruction itself
    would be cut, the picture grows downwards instead.

    Raises:
        InputError: nothing to draw, or a character that the font cannot draw.
    """
    font = font or find_font("figstep")
    lines = _drawable(figstep_text(instruction), instruction, font).split("\n")
    words = len(lines) - FIGSTEP_POINTS
    fits = words <= (FIGSTEP_SIDE - 10) // _FIGSTEP_PITCH
    size = (FIGSTEP_SIDE, FIGSTEP_SIDE if fits else 10 + _FIGSTEP_PITCH * len(lines))
    return _drawn(lines, size, font.at(_FIGSTEP_SIZE), (_FIGSTEP_LEFT, _FIGSTEP_BASELINE), _FIGSTEP_PITCH)


def typo_picture(phrase: str) -> Image.Image:
    """MM-SafetyBench's TYPO picture: RGB, 1024 wide, 90 x (lines + 1) high, black Arial of 90 px on white, at (0, 45).

    Words are wrapped greedily and a line that continues begins with a space, as there. Liberation Sans has Arial's
    metrics. The original is a JPEG; this one has no compression noise.

    Raises:
        InputError: nothing to draw, or a character that the font cannot draw.
    """
    choice = find_font("typo")
    font = choice.at(_TYPO_SIZE)
    lines = wrap_pixels(_drawable(phrase, phrase, choice), font, TYPO_WIDTH, lead=" ")
    return _drawn(lines, (TYPO_WIDTH, 90 * (len(lines) + 1)), font, (0, _TYPO_BASELINE), _TYPO_PITCH)


def page_picture(text: str) -> Image.Image:
    """`text` as a plain page: RGB, 760 wide, as high as its lines need, black DejaVu Sans of 40 px on white.

    Raises:
        InputError: nothing to draw, or a character that the font cannot draw.
    """
    choice = find_font("page")
    font = choice.at(_PAGE_SIZE)
    lines: list[str] = []
    for paragraph in _drawable(text, text, choice).split("\n"):
        lines += wrap_pixels(paragraph, font, PAGE_WIDTH - 2 * _PAGE_MARGIN) if paragraph.strip() else [""]
    size = (PAGE_WIDTH, 2 * _PAGE_MARGIN + _PAGE_PITCH * len(lines))
    return _drawn(lines, size, font, (_PAGE_MARGIN, _PAGE_MARGIN + _PAGE_SIZE), _PAGE_PITCH)


def stack_pictures(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """`top`, scaled to the width of `bottom`, above it (MM-SafetyBench's SD+TYPO)."""
    height = max(1, round(top.height * bottom.width / top.width))
    stacked = Image.new("RGB", (bottom.width, height + bottom.height), "white")
    stacked.paste(top.convert("RGB").resize((bottom.width, height), Image.Resampling.LANCZOS), (0, 0))
    stacked.paste(bottom, (0, height))
    return stacked


def wrap_pixels(text: str, font: ImageFont.FreeTypeFont, width: int, lead: str = "") -> list[str]:
    """`text` in lines of at most `width` pixels, filled greedily; lines that continue begin with `lead`.

    A word that is wider than a line is cut where the line ends.
    """
    lines, line = [], ""
    for word in text.split():
        candidate = f"{line} {word}" if line.strip() else line + word
        if font.getlength(candidate) > width and line.strip():
            lines.append(line)
            candidate = lead + word
        while font.getlength(candidate) > width and len(candidate.strip()) > 1:
            end = next(end for end in range(len(candidate) - 1, 0, -1) if font.getlength(candidate[:end]) <= width)
            lines.append(candidate[:end])
            candidate = lead + candidate[end:]
        line = candidate
    return [*lines, line]


def _drawn(
    lines: list[str], size: tuple[int, int], font: ImageFont.FreeTypeFont, origin: tuple[int, int], pitch: int
) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for index, line in enumerate(lines):
        # "ls": the baseline's left end. By baselines, another font stands where the benchmark's would.
        pen.text((origin[0], origin[1] + pitch * index), line, font=font, fill="black", anchor="ls")
    return picture


def _drawable(text: str, content: str, choice: FontChoice) -> str:
    if not content.strip():
        raise InputError("there is nothing to draw: the text is empty")
    missing = undrawable(text, choice)
    if missing:
        raise InputError(
            f"{choice.name} cannot draw {missing!r} (U+{ord(missing):04X}): leave it out, or set "
            f"{FONT_FOLDER_VARIABLE} to a folder with a {choice.wanted} that can"
        )
    return text
