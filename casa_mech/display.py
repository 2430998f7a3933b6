"""HTML of text, pictures, clips and tables for a notebook or a page: escaped, bounded in size, light or dark.

Templates lie in `templates/`. They colour nothing but tints over the page's own colours, which read on any theme.
Styles lie in the elements, since viewers of notebooks strip style sheets.
"""

from __future__ import annotations

import base64
import wave
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

PIXELS = 360
"""Longest side of a picture that is shown."""
SECONDS = 15.0
"""What is played of a clip."""
LETTERS = 4000
"""What is shown of a text."""
TOKENS = 800
"""What is shown of a prompt that is marked token by token."""
ROWS = 60
"""What is shown of a table."""
TINT = (213, 94, 0)
"""Red, green and blue of marked places; how much shows is the weight there."""
_WAVE_WIDTH, _WAVE_HEIGHT = 600, 64
_SMALL = 200
"""Pixels of the longest side up to which a picture is shown enlarged."""


class Html(str):
    """HTML that is escaped already: a template takes it as it is, and a notebook renders it."""

    def __html__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return str(self)


def html(template: str, **values: Any) -> Html:
    """`templates/<template>.html.jinja` filled with `values`; whatever is not `Html` is escaped."""
    return Html(_environment().get_template(f"{template}.html.jinja").render(**values))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def text_html(text: str) -> Html:
    """`text` with its line breaks; of a long one the first `LETTERS` letters, and how many more there are."""
    return html("text", text=text[:LETTERS], left=max(0, len(text) - LETTERS))


def picture_html(picture: Image.Image, weights: np.ndarray | None = None, caption: str = "") -> Html:
    """A picture, tinted by `weights` [row, column] over it, scaled to their highest."""
    width, height = picture.size
    # A strip of letters is a few pixels high: whole multiples keep its edges.
    enlarged = -(-_SMALL // max(width, height, 1))
    overlay = None if weights is None else _png(_tint(weights))
    small = picture.convert("RGB")
    small.thumbnail((PIXELS, PIXELS))
    words = f"{width} × {height} pixels"
    caption = f"{caption}; {words}" if caption else words
    return html("picture", source=_png(small), overlay=overlay, width=small.width * enlarged, caption=caption)


def clip_html(samples: np.ndarray, rate: int, weights: np.ndarray | None = None, caption: str = "") -> Html:
    """A player for mono `samples` [sample] in -1..1, over their waveform, tinted by `weights` [position] along them.

    The waveform is the whole clip; what is played are its first `SECONDS`.
    """
    seconds = len(samples) / rate
    played = f"{seconds:.1f} s" if seconds <= SECONDS else f"the first {SECONDS:.0f} of {seconds:.1f} s can be played"
    return html(
        "clip",
        source=_wav(samples[: int(SECONDS * rate)], rate),
        path=_waveform(samples),
        bars=[] if weights is None else _bars(weights),
        width=_WAVE_WIDTH,
        height=_WAVE_HEIGHT,
        tint=TINT,
        caption=f"{caption}; {played}" if caption else played,
    )


def tokens_html(tokens: Sequence[str], shares: Sequence[float]) -> Html:
    """`tokens`, each tinted by its share of all weight, scaled to the highest; the share itself is its tooltip."""
    highest = max([*shares, 1e-12])
    shown = [
        (token.strip() or repr(token)[1:-1], share, round(0.85 * share / highest, 3))
        for token, share in zip(tokens[:TOKENS], shares, strict=False)
    ]
    return html("tokens", tokens=shown, tint=TINT, left=max(0, len(tokens) - TOKENS), rest=float(sum(shares[TOKENS:])))


def table_html(frame: pd.DataFrame, caption: str = "", index: bool = True) -> Html:
    """The first `ROWS` rows of `frame` under `caption`, with the number of those that are left out."""
    cells = Html(frame.head(ROWS).to_html(escape=True, border=0, index=index))
    return html("table", table=cells, caption=caption, left=max(0, len(frame) - ROWS))


def _tint(weights: np.ndarray) -> Image.Image:
    pixels = np.zeros((*weights.shape, 4), dtype=np.uint8)
    pixels[..., :3] = TINT
    pixels[..., 3] = np.round(190 * weights / max(float(weights.max(initial=0)), 1e-12))
    return Image.fromarray(pixels)


def _bars(weights: np.ndarray) -> list[tuple[float, float, float]]:
    """Left edge, width and opacity of a bar for each position."""
    width = _WAVE_WIDTH / max(1, len(weights))
    highest = max(float(weights.max(initial=0)), 1e-12)
    return [
        (round(place * width, 2), round(width, 2), round(0.75 * float(weight) / highest, 3))
        for place, weight in enumerate(weights)
    ]


def _waveform(samples: np.ndarray) -> str:
    """SVG path of the clip's least and greatest values in each of a few hundred slices, loudest at full height."""
    slices = np.array_split(samples.astype(float), min(len(samples), _WAVE_WIDTH // 2))
    middle = _WAVE_HEIGHT / 2
    scale = (middle - 1) / max(float(np.abs(samples).max(initial=0)), 1e-12)
    step = _WAVE_WIDTH / len(slices)
    return "".join(
        f"M{(place + 0.5) * step:.1f} {middle - part.max() * scale:.1f}V{middle - part.min() * scale + 0.5:.1f}"
        for place, part in enumerate(slices)
    )


def _png(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return _data_uri("image/png", buffer)


def _wav(samples: np.ndarray, rate: int) -> str:
    buffer = BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return _data_uri("audio/wav", buffer)


def _data_uri(kind: str, content: BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
