"""Speech: one small `Voice` interface, and espeak-ng behind it.

espeak-ng is GPL-3.0. It is never part of this package: `EspeakVoice` opens the shared library that the
`espeakng-loader` wheel installed, through ctypes, the first time something is spoken. Another synthesiser takes its
place by having `names` and `synthesise`; everything else here (spelling, noise, the cache) works on arrays.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from casa_mech.errors import InputError
from casa_mech.identity import digest_of

RATE = 16_000
VOICE_NAMES = ("en-us", "en-gb", "en-us+f2", "en-gb+m3", "en-us+m1")
SPEEDS = (235, 250, 265, 280)
PITCHES = (35, 50, 65)
_ESPEAK_RATE = 22_050
_VOICE_FILES = {"en-us": "lang/gmw/en-US", "en-gb": "lang/gmw/en"}
# Of a variant only the timbre is taken: its breath is random noise and its echo keeps a state.
_TIMBRE = ("pitch", "formant", "consonants", "stressAdd")
_BRIEF = 24  # characters of what counts as a word
_SILENCE = 0.03  # of a clip's peak: cuts espeak's fade-out tails too, which hold no phoneme


@dataclass(frozen=True)
class VoiceSettings:
    """A voice and its manner of speaking."""

    name: str = "en-us"
    """The voice's name."""
    speed: int = 260
    """Words a minute, 80 to 450."""
    pitch: int = 50
    """From 0 to 99."""
    volume: float = 1.0
    """A factor on the samples."""


class Voice(Protocol):
    """A synthesiser, as far as the audio attacks need one."""

    names: tuple[str, ...]
    """The voices it has."""

    def synthesise(self, text: str, settings: VoiceSettings) -> np.ndarray:
        """`text` as float32 `[samples]` in -1..1 at 16 kHz, silence trimmed."""
        ...


def cache_folder() -> Path:
    """Where clips are kept: `CASA_MECH_CACHE` when set, else the user's cache folder."""
    named = os.environ.get("CASA_MECH_CACHE")
    if named:
        return Path(named) / "clips"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "casa-mech" / "clips"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "casa-mech" / "clips"


class _Engine:
    """espeak-ng itself. The library keeps its state in globals, so a process has one (`_engine`)."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise InputError(
                "speech needs espeak-ng, which is not installed: pip install espeakng-loader, or pass another Voice"
            ) from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = Path(espeakng_loader.get_data_path())
        # 2 = AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback; no sound device is opened, no thread is started.
        rate = self._library.espeak_Initialize(2, 0, str(data.parent).encode(), 0)
        if rate != _ESPEAK_RATE:
            raise InputError(f"espeak-ng did not start from {data} (rate {rate}): reinstall espeakng-loader")
        self._chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # kept on self: ctypes does not keep it alive
        self._library.espeak_SetSynthCallback(self._callback)
        self._data = data
        self._folder = tempfile.TemporaryDirectory(prefix="casa-mech-voices-")

    def _receive(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, settings: VoiceSettings) -> np.ndarray:
        """`text` as int16 `[samples]` at 22,050 Hz."""
        if self._library.espeak_SetVoiceByFile(str(self._voice_file(settings.name)).encode()) != 0:
            raise InputError(f"espeak-ng cannot load the voice {settings.name!r}: reinstall espeakng-loader")
        for parameter, value in ((1, settings.speed), (2, 100), (3, settings.pitch)):  # rate, volume, pitch
            self._library.espeak_SetParameter(parameter, int(value), 0)
        self._chunks.clear()
        encoded = text.encode()
        size, flags = ctypes.c_size_t(len(encoded) + 1), ctypes.c_uint(1)  # 1 = UTF-8
        status = self._library.espeak_Synth(encoded, size, 0, 1, 0, flags, None, None)
        self._library.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise InputError(f"espeak-ng made no sound of {text!r} (status {status}): give it words or letters")
        return np.concatenate(self._chunks)

    def _voice_file(self, name: str) -> Path:
        """The installed voice and its variant as one file, without flutter.

        Flutter runs on from one utterance to the next, so that with it a clip would depend on what was said before.
        """
        # "+" in a file's name would make espeak-ng apply its own variant on top.
        path = Path(self._folder.name) / name.replace("+", "-")
        if not path.exists():
            base, _, variant = name.partition("+")
            lines = (self._data / _VOICE_FILES[base]).read_text(encoding="utf-8").splitlines()
            if variant:
                timbre = (self._data / "voices" / "!v" / variant).read_text(encoding="utf-8").splitlines()
                lines += [line for line in timbre if line.split()[:1] and line.split()[0] in _TIMBRE]
            path.write_text("\n".join([*lines, "flutter 0", "roughness 0", ""]), encoding="utf-8")
        return path


@lru_cache(maxsize=1)
def _engine() -> _Engine:
    return _Engine()


def trim(clip: np.ndarray) -> np.ndarray:
    """`clip` `[samples]` without the silence around it."""
    loud = np.flatnonzero(np.abs(clip) > _SILENCE * max(float(np.abs(clip).max()), 1e-9))
    return clip[loud[0] : loud[-1] + 1] if len(loud) else clip[:0]


class EspeakVoice:
    """espeak-ng, loaded when first used.

    Clips are kept on disk under a hash of what is said and how; the last 8,192 letters and words in the process too.
    """

    names: tuple[str, ...] = VOICE_NAMES

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache

    def synthesise(self, text: str, settings: VoiceSettings = VoiceSettings()) -> np.ndarray:
        """`text` as float32 `[samples]` at 16 kHz. InputError: nothing to say, unknown voice, espeak-ng missing."""
        text = " ".join(text.split())
        if not text:
            raise InputError("there is nothing to speak: the text is empty")
        if settings.name not in self.names:
            raise InputError(f"unknown voice {settings.name!r}; known voices: {', '.join(self.names)}")
        if not (80 <= settings.speed <= 450 and 0 <= settings.pitch <= 99 and settings.volume > 0):
            raise InputError(f"{settings}: speed is 80-450 words a minute, pitch 0-99, volume above 0")
        # Sentences are read from the disk each time: thousands of them would fill the memory.
        spoken = _spoken if len(text) <= _BRIEF else _cached
        clip = spoken(str(self._cache or cache_folder()), text, settings.name, settings.speed, settings.pitch)
        return clip if settings.volume == 1.0 else np.clip(clip * np.float32(settings.volume), -1, 1)


def _cached(folder: str, text: str, name: str, speed: int, pitch: int) -> np.ndarray:
    # Volume is left out on purpose: it is a factor on the samples and would only multiply the cache.
    import soundfile

    key = digest_of(repr(("v2", text, name, speed, pitch)))
    path = Path(folder) / key[:2] / f"{key[:32]}.wav"
    try:
        clip, _ = soundfile.read(path, dtype="float32")
    except (OSError, soundfile.SoundFileError):
        clip = np.zeros(0, dtype=np.float32)
    if not len(clip):
        clip = _synthesised(text, VoiceSettings(name, speed, pitch))
        _keep(path, clip)
    clip.setflags(write=False)
    return clip


_spoken = lru_cache(maxsize=8192)(_cached)


def _synthesised(text: str, settings: VoiceSettings) -> np.ndarray:
    from scipy.signal import resample_poly

    raw = _engine().speak(text, settings).astype(np.float32) / 32768
    clip = trim(resample_poly(raw, 320, 441))  # 22,050 * 320 / 441 = 16,000
    # Rounded as the WAV file will round it, so that a clip is the same before and after it was cached.
    return (np.clip(np.round(clip * 32768), -32768, 32767) / 32768).astype(np.float32)


def _keep(path: Path, clip: np.ndarray) -> None:
    """Write a clip to the cache; a cache that cannot be written costs time, not the run."""
    import soundfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            soundfile.write(file, (clip * 32768).astype(np.int16), RATE, format="WAV", subtype="PCM_16")
        os.replace(name, path)
    except (OSError, soundfile.SoundFileError):
        return


@lru_cache(maxsize=1)
def default_voice() -> EspeakVoice:
    """The voice that attacks use when none is given."""
    return EspeakVoice()


def draw_settings(rng: np.random.Generator, names: Sequence[str] = VOICE_NAMES) -> VoiceSettings:
    """A random voice, speed and pitch from a fixed grid (a grid, so that letters are cached), and a random volume."""
    return VoiceSettings(
        name=str(rng.choice(list(names))),
        speed=int(rng.choice(SPEEDS)),
        pitch=int(rng.choice(PITCHES)),
        volume=float(rng.uniform(0.5, 1.2)),
    )


def spell_clip(
    letters: str,
    settings: VoiceSettings,
    rng: np.random.Generator,
    gap_ms: tuple[float, float] = (5.0, 40.0),
    voice: Voice | None = None,
) -> np.ndarray:
    """`letters` spoken one by one with gaps drawn from `gap_ms`: float32 `[samples]` at 16 kHz."""
    spoken = [letter for letter in letters.lower() if letter.isalnum()]
    if not spoken:
        raise InputError(f"there is nothing to spell in {letters!r}: it holds no letter")
    speaker, plain = voice or default_voice(), replace(settings, volume=1.0)
    gaps = (rng.uniform(*gap_ms, size=len(spoken)) * RATE / 1000).astype(int)
    pieces: list[np.ndarray] = []
    for letter, gap in zip(spoken, gaps, strict=True):
        said = speaker.synthesise(letter, plain)
        if not len(said):
            raise InputError(f"voice {settings.name!r} made a clip of zero length of {letter!r}: choose another voice")
        pieces += [said, np.zeros(gap, dtype=np.float32)]
    clip = np.concatenate(pieces[:-1])
    return np.clip(clip * np.float32(settings.volume), -1, 1)


def add_noise(clip: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """`clip` with white noise `snr_db` decibels below its mean power; float32, same shape, kept within -1..1."""
    power = float(np.mean(np.square(clip, dtype=np.float64))) if len(clip) else 0.0
    noise = rng.standard_normal(len(clip), dtype=np.float32) * np.float32((power / 10 ** (snr_db / 10)) ** 0.5)
    return np.clip(clip + noise, -1, 1).astype(np.float32)
