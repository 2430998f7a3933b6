"""Pictures and clips of a query as the decoding-time defences need them: which there are, and noised copies."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from casa_mech.attacks.seeding import query_rng
from casa_mech.errors import InputError
from casa_mech.queries import AudioPart, ImagePart, Part, Query
from casa_mech.queries.media import SAMPLE_RATE, load_audio, load_image


def need_image(queries: Iterable[Query], defense: str, extend: bool) -> None:
    """Refuse queries for which a defence made for pictures is not defined, unless its extension is on.

    Raises:
        InputError: a query without a picture in its user turn, `extend` being off; it names the query and the switch.
    """
    if extend:
        return
    for query in queries:
        if "image" not in query.modalities:
            kinds = " and ".join(sorted(query.modalities)) or "nothing"
            raise InputError(
                f"query {query.id}: {defense} is defined for pictures and this query has {kinds} alone; "
                "set extend=True for the package's extension to text and audio"
            )


def noised(query: Query, sigma: float, seed: int = 0, audio: bool = True) -> Query | None:
    """`query` with Gaussian noise on the pictures, and with `audio` the clips, of its user turn; None without either.

    Pictures are scaled to [0, 1], noised with standard deviation `sigma` and clipped (SafeCoDe, docs/method.md §2).
    Clips, which the paper leaves out, are scaled by their peak to [-1, 1], noised and clipped in the same way. The
    noise is fixed by `seed` and the query's id; with `sigma` 0 the copy is the same picture.
    """
    rng = query_rng(query, seed, "safecode")
    parts = tuple(_noised_part(part, sigma, rng, audio, f"query {query.id}") for part in query.parts)
    changed = any(new is not old for new, old in zip(parts, query.parts, strict=True))
    return query.model_copy(update={"parts": parts}) if changed else None


def _noised_part(part: Part, sigma: float, rng: np.random.Generator, audio: bool, where: str) -> Part:
    if isinstance(part, ImagePart):
        pixels = np.asarray(load_image(part, where), dtype=np.float32) / 255
        pixels = np.clip(pixels + sigma * rng.standard_normal(pixels.shape, dtype=np.float32), 0, 1)
        return ImagePart(image=Image.fromarray((pixels * 255).round().astype(np.uint8)))
    if isinstance(part, AudioPart) and audio:
        clip = load_audio(part, where)
        peak = float(np.abs(clip).max())
        noise = sigma * peak * rng.standard_normal(clip.shape, dtype=np.float32)
        return AudioPart(audio=np.clip(clip + noise, -peak, peak), rate=SAMPLE_RATE)
    return part
