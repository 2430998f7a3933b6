"""Pictures and clips from paths or arrays, checked, in the one form that the processors take."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from casa_mech.errors import InputError
from casa_mech.limits import CLIP_SECONDS, GREATEST_RATE, LEAST_RATE, LOUDEST
from casa_mech.queries.media_files import check_size, open_picture

if TYPE_CHECKING:
    from soundfile import SoundFile

    from casa_mech.queries.query import AudioPart, ImagePart, Query

SAMPLE_RATE = 16_000
MIN_SECONDS = 0.1
SILENCE = 1e-5
_LOSSLESS = ("WAV", "WAVEX", "FLAC", "AIFF")
"""Formats whose header says exactly how many samples follow."""
_CHUNKS = {b"RIFF": ("<4sI", b"data"), b"FORM": (">4sI", b"SSND")}
"""By a file's first bytes, how it writes the name and size of a chunk, and the name of the one with the samples."""
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)
"""What programs that write a WAV file to a pipe put in the place of its size; odd ones are a little smaller."""
_SLACK, _BLOCK = 4096, 2**18


def load_image(part: ImagePart, where: str) -> Image.Image:
    """The picture of `part` as RGB.

    Args:
        part: a path, PIL image or array.
        where: what to call it in an error, such as a query id.

    Raises:
        InputError: no such file, not a picture, too large or too thin, or an array that is not `[height, width]` or
            `[height, width, 3]`.
    """
    source = part.image
    if not isinstance(source, Image.Image | np.ndarray):
        return open_picture(source, where)
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[-1] not in (1, 3, 4)) or not source.size:
            raise InputError(f"{where}: an image array must be [height, width, 3], not {list(source.shape)}")
        pixels = source if source.dtype == np.uint8 else (np.clip(source, 0, 1) * 255).round().astype(np.uint8)
        source = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    check_size(source.width, source.height, f"{where}: the picture")
    return source.convert("RGB")


def load_audio(part: AudioPart, where: str) -> np.ndarray:
    """The clip of `part` as mono float32 `[samples]` at 16 kHz.

    Args:
        part: a path to anything soundfile reads, or an array with its rate in hertz.
        where: what to call it in an error, such as a query id.

    Raises:
        InputError: no such file, not audio, cut off, empty, shorter than 0.1 s, longer or of another rate than
            `casa_mech.limits` allows, not finite, beyond full scale, or digitally silent.
    """
    return _resample(*_samples(part, where))


def _samples(part: AudioPart, where: str) -> tuple[np.ndarray, int]:
    """The clip of `part` as mono float32 `[samples]`, and its rate in hertz. InputError: as `load_audio`."""
    if isinstance(part.audio, np.ndarray):
        name, rate = "the audio array", int(part.rate or 0)
        if part.audio.ndim not in (1, 2):
            raise InputError(f"{where}: {name} must be [samples] or [samples, channels], not {list(part.audio.shape)}")
        _check_length(len(part.audio), rate, f"{where}: {name}")
        samples = _to_float(part.audio)
    else:
        name = str(part.audio)
        samples, rate = _read(Path(part.audio), f"{where}: {name}", where)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise InputError(f"{where}: {name} holds NaN or infinite samples; export the clip again")
    loudest = float(np.abs(samples).max())
    if loudest > LOUDEST:
        raise InputError(
            f"{where}: {name} has samples of {loudest:.3g}, and full scale is 1; export the clip again, scaled to -1..1"
        )
    if loudest < SILENCE:
        raise InputError(f"{where}: {name} is silent; check the recording (add faint noise if silence is meant)")
    return samples, rate


def check_media(queries: Iterable[Query]) -> None:
    """Open every picture and clip, earlier turns' too, so that a bad one stops a run before it begins.

    Raises:
        InputError: the first that cannot be used, with its query's id.
    """
    for query in queries:
        for part in (part for parts in (*(turn.parts for turn in query.history), query.parts) for part in parts):
            if part.kind == "image":
                load_image(part, f"query {query.id}")
            elif part.kind == "audio":
                _samples(part, f"query {query.id}")


def _check_length(n: int, rate: int, where: str) -> None:
    """InputError for a clip of `n` samples at `rate` hertz whose rate or length is none that is read."""
    if not LEAST_RATE.value <= rate <= GREATEST_RATE.value:
        limit = LEAST_RATE if rate < LEAST_RATE.value else GREATEST_RATE
        raise InputError(
            f"{where} has a sampling rate of {rate} Hz, and {LEAST_RATE.value:g} to {GREATEST_RATE.value:g} Hz are "
            f"read: export it at 16000 Hz, or {limit.way_out}"
        )
    if n < MIN_SECONDS * rate:
        raise InputError(f"{where} is empty or shorter than {MIN_SECONDS} s; give a longer clip")
    if n > CLIP_SECONDS.value * rate:
        raise InputError(
            f"{where} lasts {n / rate:,.0f} s, and {CLIP_SECONDS.value:g} s are read: cut it, or {CLIP_SECONDS.way_out}"
        )


def _read(path: Path, name: str, where: str) -> tuple[np.ndarray, int]:
    """A file's samples, its channels' mean, and their rate; `name` names query and file in an error."""
    import soundfile

    if not path.is_file():
        if path.exists():  # a pipe would be waited for
            raise InputError(f"{name} is a folder, pipe or device; give a WAV, FLAC, OGG or MP3 file")
        raise InputError(f"{where}: no audio file at {path}; check the path")
    try:
        with soundfile.SoundFile(str(path)) as file:
            _check_length(file.frames, file.samplerate, name)
            samples, lossless = _mono(file), file.format in _LOSSLESS
            cut = lossless and (len(samples) < file.frames or _lacks_bytes(path))
            rate = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError, UnicodeError) as error:
        raise InputError(f"{name} is not readable audio ({error}); give a WAV, FLAC, OGG or MP3 file") from None
    if cut:
        raise InputError(f"{name} is cut off: its header promises more samples than there are; export the clip again")
    return samples, rate


def _mono(file: SoundFile) -> np.ndarray:
    """All samples of an open file, float32; block by block, so that many channels need no more memory than one."""
    blocks = [block.mean(axis=1) for block in file.blocks(_BLOCK, dtype="float32", always_2d=True)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _lacks_bytes(path: Path) -> bool:
    """True for a WAV or AIFF file that ends before the size that its chunk of samples states; libsndfile takes it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        kind = file.read(12)[:4]
        if kind not in _CHUNKS:
            return False
        layout, samples = _CHUNKS[kind]
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack(layout, head)
            if name == samples:
                known = all(not unknown - _SLACK <= length <= unknown for unknown in _UNKNOWN_SIZES)
                return known and file.tell() + length > size
            file.seek(length + length % 2, 1)
    return False


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
