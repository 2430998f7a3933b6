"""Pictures and clips from paths or arrays, checked, in the one form that the processors take."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from casa_mech.errors import InputError

if TYPE_CHECKING:
    from casa_mech.queries.query import AudioPart, ImagePart, Query

SAMPLE_RATE = 16_000
MIN_SECONDS = 0.1
SILENCE = 1e-5


def load_image(part: ImagePart, where: str) -> Image.Image:
    """The picture of `part` as RGB.

    Args:
        part: a path, PIL image or array.
        where: what to call it in an error, such as a query id.

    Raises:
        InputError: no such file, not a picture, or an array that is not `[height, width]` or `[height, width, 3]`.
    """
    source = part.image
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[-1] not in (1, 3, 4)):
            raise InputError(f"{where}: an image array must be [height, width, 3], not {list(source.shape)}")
        pixels = source if source.dtype == np.uint8 else (np.clip(source, 0, 1) * 255).round().astype(np.uint8)
        return Image.fromarray(pixels.squeeze()).convert("RGB")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{where}: no image at {source}; check the path") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{where}: {source} is not a readable image ({error}); give a PNG or JPEG file") from None


def load_audio(part: AudioPart, where: str) -> np.ndarray:
    """The clip of `part` as mono float32 `[samples]` at 16 kHz.

    Args:
        part: a path to anything soundfile reads, or an array with its rate in hertz.
        where: what to call it in an error, such as a query id.

    Raises:
        InputError: no such file, not audio, empty, shorter than 0.1 s, not finite, or digitally silent.
    """
    if isinstance(part.audio, np.ndarray):
        samples, rate, name = part.audio, int(part.rate or 0), "the audio array"
    else:
        samples, rate = _read(part.audio, where)
        name = str(part.audio)
    samples = _to_float(samples)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if samples.ndim != 1:
        raise InputError(f"{where}: {name} must be [samples] or [samples, channels], not {list(samples.shape)}")
    if samples.size < MIN_SECONDS * rate:
        raise InputError(f"{where}: {name} is empty or shorter than {MIN_SECONDS} s; give a longer clip")
    if not np.isfinite(samples).all():
        raise InputError(f"{where}: {name} holds NaN or infinite samples; export the clip again")
    if np.abs(samples).max() < SILENCE:
        raise InputError(f"{where}: {name} is silent; check the recording (add faint noise if silence is meant)")
    return _resample(samples, rate)


def check_media(queries: Iterable[Query]) -> None:
    """Open every picture and clip that is a file, so that a bad one stops a run before it begins.

    Raises:
        InputError: the first that is missing, unreadable, empty or silent, with its query's id.
    """
    for query in queries:
        for part in query.parts:
            if part.kind == "image" and isinstance(part.image, Path):
                load_image(part, f"query {query.id}")
            elif part.kind == "audio" and isinstance(part.audio, Path):
                load_audio(part, f"query {query.id}")


def _read(path: Path, where: str) -> tuple[np.ndarray, int]:
    import soundfile

    if not Path(path).is_file():
        raise InputError(f"{where}: no audio file at {path}; check the path")
    try:
        return soundfile.read(str(path), dtype="float32", always_2d=False)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise InputError(
            f"{where}: {path} is not readable audio ({error}); give a WAV, FLAC, OGG or MP3 file"
        ) from None


def _to_float(samples: np.ndarray) -> np.ndarray:
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / np.iinfo(samples.dtype).max
    return samples.astype(np.float32)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(samples, dtype=np.float32)
    from scipy.signal import resample_poly

    divisor = gcd(rate, SAMPLE_RATE)
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)
