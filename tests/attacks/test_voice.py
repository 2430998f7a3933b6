"""Speech: real clips from espeak-ng, their cache, spelling, noise."""

import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from casa_mech.attacks import voice as module
from casa_mech.attacks.voice import (
    PITCHES,
    RATE,
    SPEEDS,
    VOICE_NAMES,
    EspeakVoice,
    VoiceSettings,
    add_noise,
    draw_settings,
    spell_clip,
)
from casa_mech.errors import InputError


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    return EspeakVoice(tmp_path_factory.mktemp("clips"))


def test_every_voice_says_a_letter_briefly(voice):
    assert len(VOICE_NAMES) >= 4
    clips = {name: voice.synthesise("b", VoiceSettings(name)) for name in VOICE_NAMES}
    for clip in clips.values():
        assert clip.dtype == np.float32 and clip.ndim == 1
        assert 0.08 <= len(clip) / RATE <= 0.35
        assert 0.05 < np.abs(clip).max() <= 1
    assert len({clip.tobytes() for clip in clips.values()}) == len(VOICE_NAMES), "voices sound alike"


def test_letters_differ_and_silence_is_trimmed(voice):
    clips = [voice.synthesise(letter, VoiceSettings()) for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert len({clip.tobytes() for clip in clips}) == 26
    assert 0.13 <= np.mean([len(clip) for clip in clips]) / RATE <= 0.24
    for clip in clips:
        assert np.abs(clip[[0, -1]]).min() > 0.02 * np.abs(clip).max()


def test_speed_pitch_and_volume_do_what_they_say(voice):
    slow, fast = (len(voice.synthesise("window", VoiceSettings(speed=speed))) for speed in (200, 300))
    assert fast < 0.85 * slow
    low, high = (voice.synthesise("a", VoiceSettings(pitch=pitch)) for pitch in (20, 80))
    assert not np.array_equal(low, high)
    loud, soft = (voice.synthesise("a", VoiceSettings(volume=volume)) for volume in (1.0, 0.5))
    np.testing.assert_allclose(soft, 0.5 * loud, atol=1e-7)


def test_clips_are_cached_as_wav_and_read_back_equal(tmp_path, monkeypatch):
    first = EspeakVoice(tmp_path).synthesise("bomb", VoiceSettings())
    (path,) = tmp_path.rglob("*.wav")
    stored, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE and np.array_equal(stored, first)
    module._spoken.cache_clear()
    monkeypatch.setattr(module, "_synthesised", lambda *_: pytest.fail("the cached clip was not used"))
    assert np.array_equal(EspeakVoice(tmp_path).synthesise(" bomb ", VoiceSettings()), first)


def test_a_broken_cached_clip_is_made_again(tmp_path):
    first = EspeakVoice(tmp_path).synthesise("a", VoiceSettings())
    (path,) = tmp_path.rglob("*.wav")
    path.write_bytes(b"not a wav")
    module._spoken.cache_clear()
    assert np.array_equal(EspeakVoice(tmp_path).synthesise("a", VoiceSettings()), first)
    assert soundfile.info(path).samplerate == RATE


def test_a_cache_that_cannot_be_written_does_not_stop_the_voice(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert len(EspeakVoice(blocked).synthesise("a", VoiceSettings()))


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("CASA_MECH_CACHE", str(tmp_path))
    EspeakVoice().synthesise("z", VoiceSettings())
    assert list((tmp_path / "clips").rglob("*.wav"))


def test_another_process_gives_the_same_sound_whatever_was_said_before(tmp_path):
    """A process starts espeak-ng once: a second start in it leaves the library's phonemes damaged."""
    program = (
        "import sys, numpy, pathlib\n"
        "from casa_mech.attacks.voice import EspeakVoice, VoiceSettings\n"
        "clip = EspeakVoice(pathlib.Path(sys.argv[1])).synthesise('q', VoiceSettings('en-gb'))\n"
        "numpy.save(sys.argv[2], clip)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "q.npy")], check=True, timeout=120
    )
    for number, name in enumerate(module.VOICE_NAMES):
        module._engine().speak("a cake" * (number + 1), VoiceSettings(name, speed=120 + 40 * number, pitch=30 + number))
    here = EspeakVoice(tmp_path / "b").synthesise("q", VoiceSettings("en-gb"))
    assert np.array_equal(np.load(tmp_path / "q.npy"), here)


def test_spelling_is_letters_with_gaps_and_fixed_by_the_seed(voice):
    def spelled(seed):
        return spell_clip("bomb", VoiceSettings(), np.random.default_rng(seed), (10, 10), voice)

    letters = [voice.synthesise(letter, VoiceSettings()) for letter in "bomb"]
    clip = spelled(0)
    assert len(clip) == sum(map(len, letters)) + 3 * RATE // 100
    np.testing.assert_array_equal(clip[: len(letters[0])], letters[0])
    np.testing.assert_array_equal(clip[-len(letters[3]) :], letters[3])
    np.testing.assert_array_equal(clip, spelled(0))
    varied = spell_clip("bomb", VoiceSettings(), np.random.default_rng(1), (5, 40), voice)
    assert len(varied) != len(spell_clip("bomb", VoiceSettings(), np.random.default_rng(2), (5, 40), voice))


def test_a_six_letter_word_is_short_and_quick_to_spell_again(voice):
    settings, rng = VoiceSettings(), np.random.default_rng(0)
    assert 0.8 <= len(spell_clip("poison", settings, rng, voice=voice)) / RATE <= 1.6
    start = time.perf_counter()
    for _ in range(50):
        spell_clip("poison", settings, rng, voice=voice)
    assert (time.perf_counter() - start) / 50 < 0.01  # about 0.1 ms on an idle core


def test_noise_has_the_asked_power_and_the_clip_stays_in_range():
    rng = np.random.default_rng(0)
    clip = (0.3 * np.sin(np.arange(RATE) / 20)).astype(np.float32)
    noisy = add_noise(clip, 20, rng)
    measured = 10 * np.log10(np.mean(clip**2) / np.mean((noisy - clip) ** 2))
    assert noisy.dtype == np.float32 and noisy.shape == clip.shape
    assert abs(measured - 20) < 0.3
    assert np.abs(add_noise(np.ones(100, dtype=np.float32), 0, rng)).max() <= 1


def test_drawn_settings_stay_on_the_cached_grid():
    rng = np.random.default_rng(0)
    drawn = [draw_settings(rng) for _ in range(400)]
    assert {item.name for item in drawn} == set(VOICE_NAMES)
    assert {item.speed for item in drawn} == set(SPEEDS) and {item.pitch for item in drawn} == set(PITCHES)
    assert len({item.volume for item in drawn}) > 300


def test_bad_input_is_named(voice, monkeypatch):
    with pytest.raises(InputError, match="the text is empty"):
        voice.synthesise("  ", VoiceSettings())
    with pytest.raises(InputError, match="unknown voice 'klingon'; known voices: en-us"):
        voice.synthesise("a", VoiceSettings("klingon"))
    with pytest.raises(InputError, match="speed is 80-450"):
        voice.synthesise("a", VoiceSettings(speed=9))
    with pytest.raises(InputError, match="holds no letter"):
        spell_clip("...", VoiceSettings(), np.random.default_rng(0), voice=voice)
    module._engine.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match="pip install espeakng-loader"):
        voice.synthesise("never said before", VoiceSettings())
