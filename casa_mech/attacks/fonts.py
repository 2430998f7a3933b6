"""The font that draws a picture: the benchmark's own where the user's folder has it, else a shipped one.

Fonts of the system are not looked for, so that a picture is the same on every machine. `font_files/` holds Liberation
Sans (Arial's metrics, MM-SafetyBench), TeX Gyre Cursor Bold (the metrics and nearly the letters of FigStep's FreeMono
Bold, which is under the GPL) and DejaVu Sans, each with its licence.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import ImageFont

from casa_mech.errors import InputError

Use = Literal["figstep", "typo", "page"]
FONT_FOLDER_VARIABLE = "CASA_MECH_FONTS"
FONT_FILES = Path(__file__).parent / "font_files"


@dataclass(frozen=True)
class _Face:
    benchmark: tuple[str, ...]
    """File names of the benchmark's font, looked for in the user's folder."""
    shipped: str
    """The file of `font_files` that draws otherwise."""
    exact: bool
    """Whether the shipped font is the benchmark's, or has its metrics and letters."""


_FACES: dict[Use, _Face] = {
    "figstep": _Face(("FreeMonoBold.ttf", "FreeMonoBold.otf"), "texgyrecursor-bold.otf", False),
    "typo": _Face(("LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"), "LiberationSans-Regular.ttf", True),
    "page": _Face(("DejaVuSans.ttf",), "DejaVuSans.ttf", True),
}


@dataclass(frozen=True)
class FontChoice:
    """The font that draws for one use."""

    name: str
    """The font's own name and style."""
    path: Path
    """Its file."""
    exact: bool
    """Whether it is the benchmark's font, or a font made to replace it."""
    wanted: str
    """The benchmark's font, as a file name."""
    note: str = ""
    """What draws instead of what, and how to get the benchmark's font; "" when exact."""

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at `size` pixels. Without text shaping, so that a picture is the same wherever it is drawn."""
        return _loaded(self.path, size)


def find_font(use: Use) -> FontChoice:
    """The font for `use`: the benchmark's from the folder that `CASA_MECH_FONTS` names, else the shipped one.

    Raises:
        InputError: the variable names no folder, or the font in it cannot be read.
    """
    return fonts_for(use)[0]


def fonts_for(use: Use) -> tuple[FontChoice, ...]:
    """All fonts at hand for `use`, the best first.

    Raises:
        InputError: the variable names no folder, or the font in it cannot be read.
    """
    return _fonts_for(use, os.environ.get(FONT_FOLDER_VARIABLE, ""))


@lru_cache(maxsize=16)
def _fonts_for(use: Use, folder: str) -> tuple[FontChoice, ...]:
    face, fonts = _FACES[use], []
    own = _files_in(folder)
    path = next((own[file] for file in face.benchmark if file in own), None)
    if path is not None:
        fonts.append(FontChoice(_name(path), path, True, face.benchmark[0]))
    shipped = FONT_FILES / face.shipped
    note = (
        f"{_name(shipped)} draws the {use} pictures in place of {face.benchmark[0]}, in the same places and with "
        f"nearly the same letters; for the benchmark's own font, set {FONT_FOLDER_VARIABLE} to a folder that holds it"
    )
    return (*fonts, FontChoice(_name(shipped), shipped, face.exact, face.benchmark[0], "" if face.exact else note))


def undrawable(text: str, font: FontChoice) -> str:
    """The first character of `text` that `font` has no shape for, or ""."""
    return next((letter for letter in text if ord(letter) > 126 and _is_missing(letter, font.path)), "")


@lru_cache(maxsize=4096)
def _is_missing(letter: str, path: Path) -> bool:
    # U+FFFFF is a private place that these fonts leave empty: what stands for it stands for every missing letter.
    font = _loaded(path, 32)
    return not letter.isspace() and bytes(font.getmask(letter)) == bytes(font.getmask("\U000fffff"))


@lru_cache(maxsize=64)
def _loaded(path: Path, size: int) -> ImageFont.FreeTypeFont:
    try:
        # From bytes: given a path that fails, Pillow looks for another file of that name among the system's fonts.
        return ImageFont.truetype(io.BytesIO(path.read_bytes()), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise InputError(f"{path} is not a readable font ({error}): remove it or install it again") from None


def _name(path: Path) -> str:
    return " ".join(part or "" for part in _loaded(path, 16).getname())


def _files_in(folder: str) -> dict[str, Path]:
    """Font files by name, in `folder` and below it; none for ""."""
    if not folder:
        return {}
    if not Path(folder).is_dir():
        raise InputError(f"{FONT_FOLDER_VARIABLE} names {folder}, which is not a folder: correct or unset it")
    return {path.name: path for path in sorted(Path(folder).rglob("*.[ot]tf"), reverse=True)}
