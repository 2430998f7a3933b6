"""Pictures from files, and pictures and clips as files that are named after what they hold: equal ones are one file."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from casa_mech.errors import InputError
from casa_mech.files import writing
from casa_mech.identity import json_digest, part_identity
from casa_mech.limits import LONGEST_TO_SHORTEST, PIXELS
from casa_mech.queries.query import AudioPart, ImagePart


def open_picture(path: Path | str, where: str = "") -> Image.Image:
    """The picture in a file as RGB. Its size is looked at before any of it is decoded.

    Args:
        path: of a type that Pillow reads.
        where: whose it is, for an error, such as a query id.

    Raises:
        InputError: no such file, a pipe or device, not a picture, or one that `check_size` refuses.
    """
    path = Path(path)
    name = f"{where}: {path}" if where else str(path)
    if not path.is_file():
        if path.exists():  # a pipe would be waited for
            raise InputError(f"{name} is a folder, pipe or device; give a PNG or JPEG file")
        raise InputError(f"{where}{where and ': '}no image at {path}; check the path")
    bound = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Pillow's own bound of a bomb: ours takes its place, which a variable can raise.
            Image.MAX_IMAGE_PIXELS = None
            with Image.open(path) as image:
                check_size(image.width, image.height, name)
                return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # a decoder of a broken file raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is not a readable image ({reason}); give a PNG or JPEG file") from None
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def check_size(width: int, height: int, where: str) -> None:
    """Refuse a picture that is too large to decode or too thin to read.

    Raises:
        InputError: it has more than `limits.PIXELS`, or one side is more than `limits.LONGEST_TO_SHORTEST` times the
            other; the message begins with `where`.
    """
    if width * height > PIXELS.value:
        raise InputError(
            f"{where} has {width} x {height} pixels, and {PIXELS.value:,.0f} are read: make it smaller, or "
            f"{PIXELS.way_out}"
        )
    if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
        raise InputError(
            f"{where} is {width} x {height} pixels: one side is more than {LONGEST_TO_SHORTEST} times the other, which "
            "no picture processor reads; crop it"
        )


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
