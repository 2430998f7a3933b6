"""Pictures and clips that are broken, hostile or beyond a limit are refused by one line, and quickly."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from casa_mech.errors import InputError
from casa_mech.queries import AudioPart, ImagePart, Query, TextPart, Turn
from casa_mech.queries.media import SAMPLE_RATE, check_media, load_audio, load_image


def refused(part: ImagePart | AudioPart) -> str:
    """The line by which `part` is refused."""
    load = load_image if isinstance(part, ImagePart) else load_audio
    with pytest.raises(InputError) as caught:
        load(part, "query q1")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("query q1: ")
    return str(caught.value)


def noise(n: int = SAMPLE_RATE) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(n)).astype(np.float32)


def bomb(path: Path, side: int) -> Path:
    """A PNG file of a few bytes that says it has `side` by `side` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")))
    return path


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    message = refused(ImagePart(image=bomb(tmp_path / "bomb.png", side)))
    assert f"bomb.png has {side} x {side} pixels, and 64,000,000 are read" in message
    assert "set CASA_MECH_MAX_PIXELS for others" in message


def test_the_limit_on_pixels_is_for_moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    part = ImagePart(image=tmp_path / "a.png")
    monkeypatch.setenv("CASA_MECH_MAX_PIXELS", "1199")
    assert "has 40 x 30 pixels, and 1,199 are read" in refused(part)
    monkeypatch.setenv("CASA_MECH_MAX_PIXELS", "1200")
    assert load_image(part, "q").size == (40, 30)
    for wrong in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv("CASA_MECH_MAX_PIXELS", wrong)
        with pytest.raises(InputError, match=f"CASA_MECH_MAX_PIXELS={wrong}: give a positive number, pixels of a"):
            load_image(part, "q")


@pytest.mark.parametrize(("size", "fits"), [((200, 1), True), ((201, 1), False), ((2, 402), False)])
def test_a_picture_thinner_than_processors_read_is_refused_by_the_check(tmp_path: Path, size, fits: bool) -> None:
    Image.new("RGB", size).save(tmp_path / "thin.png")
    for picture in (tmp_path / "thin.png", Image.new("RGB", size), np.zeros((size[1], size[0], 3), np.uint8)):
        query = Query(id="q1", parts=(ImagePart(image=picture),))
        earlier = Query(id="q1", parts=(TextPart(text="and now?"),), history=(Turn(role="user", parts=query.parts),))
        for asked in (query, earlier):
            if fits:
                check_media([asked])
            else:
                with pytest.raises(InputError, match=r"query q1: .* more than 200 times the other"):
                    check_media([asked])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.wav")
    assert "a.png is a folder, pipe or device" in refused(ImagePart(image=tmp_path / "a.png"))
    assert "a.wav is a folder, pipe or device" in refused(AudioPart(audio=tmp_path / "a.wav"))
    assert "is a folder, pipe" in refused(ImagePart(image=tmp_path))
    assert "no image at" in refused(ImagePart(image=tmp_path / "gone.png"))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "WEBP", "JPEG"])
def test_pictures_cut_or_changed_anywhere_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    whole, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(whole, format=kind)
    path = tmp_path / "a.png"
    for number in range(60):
        content = bytearray(whole.getvalue())
        for place in rng.integers(len(content), size=number % 4):
            content[place] = rng.integers(256)
        path.write_bytes(bytes(content[: rng.integers(1, len(content))] if number % 2 else content))
        try:
            load_image(ImagePart(image=path), "query q1")
        except InputError as error:
            assert "\n" not in str(error) and "a.png" in str(error)


def wav(path: Path, rate: int, samples: np.ndarray) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def test_rates_and_lengths_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = wav(tmp_path / "slow.wav", 1, noise())
    assert "slow.wav has a sampling rate of 1 Hz, and 4000 to 384000 Hz are read" in refused(AudioPart(audio=slow))
    assert "sampling rate of 500000 Hz" in refused(AudioPart(audio=wav(tmp_path / "fast.wav", 500_000, noise(100_000))))
    assert "sampling rate of 2 Hz" in refused(AudioPart(audio=noise(), rate=2))
    assert "sampling rate of -16000 Hz" in refused(AudioPart(audio=noise(), rate=-16_000))
    monkeypatch.setenv("CASA_MECH_MAX_CLIP_SECONDS", "0.5")
    long = AudioPart(audio=wav(tmp_path / "long.wav", SAMPLE_RATE, noise()))
    assert "long.wav lasts 1 s, and 0.5 s are read: cut it, or set CASA_MECH_MAX_CLIP_SECONDS" in refused(long)
    monkeypatch.setenv("CASA_MECH_MAX_CLIP_SECONDS", "1")
    assert len(load_audio(long, "q")) == SAMPLE_RATE
    monkeypatch.setenv("CASA_MECH_MIN_RATE", "16001")
    assert "or set CASA_MECH_MIN_RATE for others" in refused(long)
    monkeypatch.delenv("CASA_MECH_MIN_RATE")
    monkeypatch.setenv("CASA_MECH_MAX_RATE", "15999")
    assert "or set CASA_MECH_MAX_RATE for others" in refused(long)


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff"])
def test_a_clip_that_ends_before_its_header_says_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(), SAMPLE_RATE)
    content = path.read_bytes()
    assert len(load_audio(AudioPart(audio=path), "q")) == SAMPLE_RATE
    path.write_bytes(content[: len(content) // 2])
    message = refused(AudioPart(audio=path))
    assert "is cut off" in message or "is not readable audio" in message


def test_a_wav_that_was_written_to_a_pipe_has_no_size_and_is_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    for size in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
        content[place : place + 4] = size
        (tmp_path / "a.wav").write_bytes(bytes(content))
        assert len(load_audio(AudioPart(audio=tmp_path / "a.wav"), "q")) == SAMPLE_RATE


def test_samples_far_beyond_full_scale_are_refused(tmp_path: Path) -> None:
    for loud in (1e30, 32_767.0):
        path = wav(tmp_path / "loud.wav", SAMPLE_RATE, noise() * np.float32(loud))
        assert "full scale is 1" in refused(AudioPart(audio=path))
        assert "full scale is 1" in refused(AudioPart(audio=noise() * np.float32(loud), rate=SAMPLE_RATE))
    load_audio(AudioPart(audio=(noise() * 20).astype(np.float32), rate=SAMPLE_RATE), "q")


def test_many_channels_become_their_mean(tmp_path: Path) -> None:
    channels = np.stack([noise(), 3 * noise()], axis=1)
    path = wav(tmp_path / "a.wav", SAMPLE_RATE, channels)
    np.testing.assert_allclose(load_audio(AudioPart(audio=path), "q"), 2 * noise(), rtol=1e-5)
    assert "must be [samples]" in refused(AudioPart(audio=np.zeros((4, 4, 4), np.float32), rate=SAMPLE_RATE))
