"""Encoders learn letters first, as the encoders of real omni models come trained on pictures and speech.

Each tower reads random letter strings: one letter per image token, and connectionist temporal classification (Graves
et al. 2006) over the audio tokens. The code that letters are put into is `codes.letter_code`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from casa_mech.attacks.audio import SNR_DB
from casa_mech.attacks.render import render_word
from casa_mech.attacks.voice import add_noise, draw_settings, spell_clip
from casa_mech.omni import Omni
from casa_mech.organism.codes import LETTERS, codes_of, letter_code
from casa_mech.organism.training import Checkpoint, Steps, optimise

IMAGE_PULL, AUDIO_PULL = 3.0, 1.0
NAMES = {"image": "letters in images", "audio": "letters in speech"}


@dataclass(frozen=True)
class Script:
    """The texts that towers learn to read."""

    letters: tuple[str, ...]
    """The characters."""
    draw: Callable[[np.random.Generator, int], list[str]]
    """`draw(rng, count)`: texts of them."""
    say: Callable[[str, np.random.Generator], np.ndarray]
    """`say(text, rng)`: float32 [samples] at 16 kHz."""


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return ["".join(rng.choice(LETTERS, int(rng.integers(3, 9)))) for _ in range(count)]


def _spelled(word: str, rng: np.random.Generator) -> np.ndarray:
    return spell_clip(word, draw_settings(rng), rng)


SPELLING = Script(LETTERS, _words, _spelled)


class LetterCode(nn.Module):
    """Scores a feature by its squared distance to each anchor of a tower's code; the anchors do not learn.

    With `blank`, class 0 is "no letter", the blank of connectionist temporal classification. A softmax over distances
    does not mind an offset that all anchors share, so `pull` is added to the loss.
    """

    def __init__(self, omni: Omni, tower: str, shared: bool, blank: bool, letters: tuple[str, ...] = LETTERS) -> None:
        super().__init__()
        code = letter_code(omni, tower, shared, letters).detach()
        self.register_buffer("anchors", code if blank else code[1:])
        self.scale = 10 / code.norm(dim=-1).mean().item() ** 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores [position, class] of `features` [position, d_model]."""
        return -self.scale * torch.cdist(features, self.anchors).square()

    @staticmethod
    def pull(scores: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of features to their nearest anchor, as a share of an anchor's squared length."""
        return -scores.max(-1).values.mean() / 10


def train_image_letters(
    omni: Omni,
    steps: int,
    rng: np.random.Generator,
    shared: bool = True,
    progress: bool = True,
    batch_size: int = 48,
    script: Script = SPELLING,
    checkpoint: Checkpoint | None = None,
) -> float:
    """Teach the vision tower to tell letters apart; returns the last step's share of letters read."""
    tower = omni.tower("image")
    head = LetterCode(omni, "image", shared, blank=False, letters=script.letters)

    def see(words: list[str]) -> torch.Tensor:
        inputs, _ = omni.processor.images([render_word(word, rng) for word in words])
        return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output

    def step() -> tuple[torch.Tensor, float]:
        words = script.draw(rng, batch_size)
        scores = head(see(words))
        targets = _codes(words, script) - 1
        read = (scores.argmax(-1) == targets).float().mean().item()
        loss = nn.functional.cross_entropy(scores, targets)
        return loss + IMAGE_PULL * LetterCode.pull(scores), read

    return _learn_letters(omni, "image", step, steps, rng, progress, checkpoint)


def train_audio_letters(
    omni: Omni,
    steps: int,
    rng: np.random.Generator,
    shared: bool = True,
    progress: bool = True,
    batch_size: int = 32,
    script: Script = SPELLING,
    checkpoint: Checkpoint | None = None,
) -> float:
    """Teach the audio tower to hear letters; returns the last step's share of spellings heard without an error."""
    head = LetterCode(omni, "audio", shared, blank=True, letters=script.letters)

    def hear(words: list[str]) -> tuple[torch.Tensor, list[str]]:
        clips = [add_noise(script.say(word, rng), rng.uniform(*SNR_DB), rng) for word in words]
        inputs, runs = omni.processor.audio(clips)
        heard = omni.backbone.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"], return_dict=True
        )
        return heard.last_hidden_state, runs

    def step() -> tuple[torch.Tensor, float]:
        words = script.draw(rng, batch_size)
        features, runs = hear(words)
        lengths = [len(run) // len(omni.processor.marks["audio"].token) for run in runs]
        raw = head(features)
        scores = nn.utils.rnn.pad_sequence(raw.split(lengths)).log_softmax(-1)
        counts = torch.tensor([len(word) for word in words])
        loss = nn.functional.ctc_loss(scores, _codes(words, script), torch.tensor(lengths), counts, zero_infinity=True)
        return loss + AUDIO_PULL * LetterCode.pull(raw), _heard(scores.argmax(-1).T, lengths, words, script)

    return _learn_letters(omni, "audio", step, steps, rng, progress, checkpoint)


def _learn_letters(
    omni: Omni,
    tower: str,
    step: Callable[[], tuple[torch.Tensor, float]],
    steps: int,
    rng: np.random.Generator,
    progress: bool,
    checkpoint: Checkpoint | None,
) -> float:
    """Train `tower` on the loss that `step` gives with a share of letters read; returns the last step's share."""
    settings = Steps(name=NAMES[tower], trains=(tower,), steps=steps, learning_rate=2e-3, betas=(0.9, 0.999))
    share = 0.0

    def losses_from(first: int) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        nonlocal share
        for _ in range(first, steps):
            loss, share = step()
            yield loss, {"read": share}

    optimise(omni, settings, losses_from, rng, progress, checkpoint)
    return share


def _codes(words: list[str], script: Script) -> torch.Tensor:
    return torch.tensor([code for word in words for code in codes_of(word, script.letters)])


def _heard(best: torch.Tensor, lengths: list[int], words: list[str], script: Script) -> float:
    """Share of words whose greedy decoding (repeats merged, blanks dropped) is right."""
    right = 0
    for row, length, word in zip(best, lengths, words, strict=True):
        merged = torch.unique_consecutive(row[:length]).tolist()
        right += "".join(script.letters[code - 1] for code in merged if code) == word
    return right / len(words)
