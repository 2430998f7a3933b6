"""Which font draws a picture: the one a benchmark used where it is installed, else one that is always there.

No font is part of this package. FreeMono Bold (FigStep) and Liberation Sans (Arial's metrics, MM-SafetyBench) come with
Debian's fonts-freefont-ttf and fonts-liberation; the fallbacks come with matplotlib.
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


@dataclass(frozen=True)
class _Face:
    files: tuple[str, ...]
    exact: bool


@dataclass(frozen=True)
class FontChoice:
    """The font that draws for one use.

    name: the font's own name and style. path: its file. exact: whether it is the benchmark's font, or has its metrics.
    note: what was used instead of what, and how to get the right one; "" when exact.
    """

    name: str
    path: Path
    exact: bool
    note: str = ""

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at `size` pixels. Without text shaping, so that a picture is the same wherever it is drawn."""
        return _loaded(self.path, size)


_FACES: dict[Use, tuple[_Face, ...]] = {
    "figstep": (
        _Face(("FreeMonoBold.ttf", "FreeMonoBold.otf"), True),
        _Face(("DejaVuSansMono-Bold.ttf",), False),
    ),
    "typo": (
        _Face(("LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"), True),
        _Face(("DejaVuSans.ttf",), False),
    ),
    "page": (_Face(("DejaVuSans.ttf",), True),),
}
_PACKAGES = {"figstep": "fonts-freefont-ttf", "typo": "fonts-liberation"}


def find_font(use: Use) -> FontChoice:
    """The font for `use`, looked for in `CASA_MECH_FONTS` (a folder), among the system's and matplotlib's fonts.

    Raises:
        InputError: not even a fallback is there.
    """
    return fonts_for(use)[0]


def fonts_for(use: Use) -> tuple[FontChoice, ...]:
    """All fonts for `use` that are installed, the best first.

    Raises:
        InputError: there is none.
    """
    return _fonts_for(use, os.environ.get(FONT_FOLDER_VARIABLE, ""))


@lru_cache(maxsize=16)
def _fonts_for(use: Use, own: str) -> tuple[FontChoice, ...]:
    wanted, found = _FACES[use][0].files[0], []
    for face in _FACES[use]:
        path = next((_installed(own)[file] for file in face.files if file in _installed(own)), None)
        if path is None:
            continue
        name = " ".join(part or "" for part in _loaded(path, 16).getname())
        package = _PACKAGES.get(use, "fonts-dejavu-core")
        note = (
            f"{wanted} is not installed, so {name} draws the {use} pictures and letters differ from the benchmark's: "
            f"apt install {package}, or set {FONT_FOLDER_VARIABLE} to a folder that holds it"
        )
        found.append(FontChoice(name, path, face.exact, "" if face.exact else note))
    if not found:
        raise InputError(
            f"no font to draw {use} pictures: install matplotlib, or set {FONT_FOLDER_VARIABLE} to a folder"
        )
    return tuple(found)


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
        # From bytes: given a path that fails, Pillow looks for another file of that name.
        return ImageFont.truetype(io.BytesIO(path.read_bytes()), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise InputError(f"{path} is not a readable font ({error}): remove it or install it again") from None


@lru_cache(maxsize=16)
def _installed(own: str) -> dict[str, Path]:
    """Font files by name, earlier folders first."""
    home = Path.home()
    folders = [Path(own)] if own else []
    folders += [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts"]
    folders += [Path("/Library/Fonts"), home / "Library/Fonts", Path("C:/Windows/Fonts"), _matplotlib_fonts()]
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.[ot]tf")) if folder.is_dir() else ():
            found.setdefault(path.name, path)
    return found


def _matplotlib_fonts() -> Path:
    from importlib.util import find_spec

    # Found without importing matplotlib, which takes a while and wants a folder to write to.
    found = find_spec("matplotlib")
    return Path(found.origin).parent / "mpl-data/fonts/ttf" if found and found.origin else Path("mpl-data")
