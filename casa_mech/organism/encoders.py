"""Encoders learn letters first, as the encoders of real omni models come trained on pictures and speech.

Each tower reads random letter strings: one letter per image token, and connectionist temporal classification (Graves
et al. 2006) over the audio tokens. The code that letters are put into is what sets the two organisms apart: that of the
language model's own letter embeddings, so that a letter seen or heard arrives where the letter typed does, or a code of
the tower's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from casa_mech.attacks.audio import SNR_DB
from casa_mech.attacks.render import render_word
from casa_mech.attacks.voice import add_noise, draw_settings, spell_clip
from casa_mech.omni import Omni

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))

IMAGE_PULL, AUDIO_PULL = 3.0, 1.0


class LetterCode(nn.Module):
    """Scores a feature by its squared distance to an anchor for each letter; the anchors do not learn.

    The anchors are the letters' word embeddings (`into_language`), or random vectors as long as those. With `blank`,
    class 0 is a learned vector: the "no letter" of connectionist temporal classification. A softmax over distances does
    not mind an offset that all anchors share, so `pull` is added to the loss.
    """

    def __init__(self, omni: Omni, into_language: bool, blank: bool) -> None:
        super().__init__()
        ids = omni.tokenizer.convert_tokens_to_ids(list(LETTERS))
        words = omni.language_model.embed_tokens.weight[ids].detach().clone()
        own = torch.randn_like(words)
        length = words.norm(dim=-1).mean()
        self.register_buffer("letters", words if into_language else own / own.norm(dim=-1, keepdim=True) * length)
        self.blank = nn.Parameter(torch.zeros(1, omni.d_model)) if blank else None
        self.scale = 10 / length.item() ** 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores [position, class] of `features` [position, d_model]."""
        anchors = self.letters if self.blank is None else torch.cat([self.blank, self.letters])
        return -self.scale * torch.cdist(features, anchors).square()

    @staticmethod
    def pull(scores: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of features to their nearest anchor, as a share of an anchor's squared length."""
        return -scores.max(-1).values.mean() / 10


def train_image_letters(
    omni: Omni,
    steps: int,
    rng: np.random.Generator,
    into_language: bool = False,
    progress: bool = True,
    batch_size: int = 48,
) -> float:
    """Teach the vision tower to tell letters apart; returns the last step's share of letters read."""
    tower = omni.model.model.visual
    head = LetterCode(omni, into_language, blank=False)

    def see(words: list[str]) -> torch.Tensor:
        inputs, _ = omni.processor.images([render_word(word, rng) for word in words])
        return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output

    def step() -> tuple[torch.Tensor, float]:
        words = _words(rng, batch_size)
        scores = head(see(words))
        wanted = _codes(words)
        read = (scores.argmax(-1) == wanted).float().mean().item()
        loss = nn.functional.cross_entropy(scores, wanted)
        return loss + IMAGE_PULL * LetterCode.pull(scores), read

    return _fit(step, (tower, head), steps, "letters in images", progress)


def train_audio_letters(
    omni: Omni,
    steps: int,
    rng: np.random.Generator,
    into_language: bool = False,
    progress: bool = True,
    batch_size: int = 32,
) -> float:
    """Teach the audio tower to hear letters; returns the last step's share of spellings heard without an error."""
    head = LetterCode(omni, into_language, blank=True)
    tower = omni.model.model.audio_tower

    def hear(words: list[str]) -> tuple[torch.Tensor, list[str]]:
        clips = [add_noise(spell_clip(word, draw_settings(rng), rng), rng.uniform(*SNR_DB), rng) for word in words]
        inputs, runs = omni.processor.audio(clips)
        heard = omni.model.model.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"], return_dict=True
        )
        return heard.last_hidden_state, runs

    def step() -> tuple[torch.Tensor, float]:
        words = _words(rng, batch_size)
        features, runs = hear(words)
        lengths = [len(run) // len(omni.processor.audio_token) for run in runs]
        raw = head(features)
        scores = nn.utils.rnn.pad_sequence(raw.split(lengths)).log_softmax(-1)
        counts = torch.tensor([len(word) for word in words])
        loss = nn.functional.ctc_loss(scores, _codes(words) + 1, torch.tensor(lengths), counts, zero_infinity=True)
        return loss + AUDIO_PULL * LetterCode.pull(raw), _heard(scores.argmax(-1).T, lengths, words)

    return _fit(step, (tower, head), steps, "letters in speech", progress)


def _fit(
    step: Callable[[], tuple[torch.Tensor, float]],
    modules: Iterable[nn.Module],
    steps: int,
    name: str,
    progress: bool,
    learning_rate: float = 2e-3,
) -> float:
    learning = [parameter for module in modules for parameter in module.train().parameters()]
    optimizer = torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    share = 0.0
    with tqdm(total=steps, desc=name, unit="step", disable=not progress) as bar:
        for _ in range(steps):
            loss, share = step()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", read=f"{share:.2f}")
    return share


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return ["".join(rng.choice(LETTERS, int(rng.integers(3, 9)))) for _ in range(count)]


def _codes(words: list[str]) -> torch.Tensor:
    return torch.tensor([ord(letter) - ord("a") for word in words for letter in word])


def _heard(best: torch.Tensor, lengths: list[int], words: list[str]) -> float:
    """Share of words whose greedy decoding (repeats merged, blanks dropped) is right."""
    right = 0
    for row, length, word in zip(best, lengths, words, strict=True):
        merged = torch.unique_consecutive(row[:length]).tolist()
        right += "".join(LETTERS[code - 1] for code in merged if code) == word
    return right / len(words)
