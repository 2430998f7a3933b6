"""Pictures and clips as files that are named after what they hold, so that equal ones are one file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from casa_mech.errors import InputError
from casa_mech.files import writing
from casa_mech.identity import json_digest, part_identity
from casa_mech.queries.query import AudioPart, ImagePart


def store_media(part: ImagePart | AudioPart, folder: Path, query_id: str) -> str:
    """Write `part` into `folder` unless it is there, and return its file's name.

    Pictures become RGB PNG files and clips WAV files of 32-bit floats, which lose nothing; files are copied.

    Raises:
        InputError: no such file, or a clip of zero length; it names the query.
        RunError: the folder cannot be written to.
    """
    source = part.image if isinstance(part, ImagePart) else part.audio
    own = ".png" if isinstance(part, ImagePart) else ".wav"
    suffix = source.suffix.lower() if isinstance(source, Path) else own
    name = json_digest(part_identity(part, query_id))[:32] + suffix
    if (folder / name).exists():
        return name
    with writing(folder / name) as temporary:
        if isinstance(source, Path):
            shutil.copyfile(source, temporary)
        elif isinstance(part, ImagePart):
            _pixels(part).save(temporary, format="PNG")
        else:
            # Not soundfile: it stamps the time into WAV files of floats.
            from scipy.io import wavfile

            wavfile.write(temporary, int(part.rate or 0), _samples(part, query_id))
    return name


def _pixels(part: ImagePart) -> Image.Image:
    """The picture as RGB, as the model's media reader takes it."""
    source = part.image
    if isinstance(source, np.ndarray):
        pixels = source if source.dtype == np.uint8 else (np.clip(source, 0, 1) * 255).round().astype(np.uint8)
        return Image.fromarray(pixels.squeeze()).convert("RGB")
    assert isinstance(source, Image.Image)
    return source.convert("RGB")


def _samples(part: AudioPart, query_id: str) -> np.ndarray:
    """The clip as float32 in -1..1, as the model's media reader takes it."""
    source = part.audio
    assert isinstance(source, np.ndarray)
    if not source.size:
        raise InputError(f"query {query_id!r}: its clip has zero length; give a longer one")
    if np.issubdtype(source.dtype, np.integer):
        return source.astype(np.float32) / np.iinfo(source.dtype).max
    return source.astype(np.float32)
