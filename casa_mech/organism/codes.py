"""The codes that towers write letters in, and ideal features: those that a perfect tower would give the language model.

The two organisms differ here. A shared code is that of the language model's own letter embeddings, so that
a letter seen or heard arrives where the letter typed does; otherwise each tower has a code of its own. The language
model learns to read either from ideal features, before there is a tower, and the towers then learn to produce them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from casa_mech.omni import Omni, OmniBatch
from casa_mech.queries import Example

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SEEDS = {"image": 11, "audio": 12}
TOKENS_PER_SOUND = 3
NOISE = 0.4
"""Ideal features get white noise of up to this share of a code's length; trained towers miss by about a third of it."""


def letter_code(omni: Omni, tower: str, shared: bool, letters: Sequence[str] = LETTERS) -> Tensor:
    """Anchors [1 + letter, d_model] of `tower`: "no letter", then `letters`; all about as long as a word embedding.

    A shared code's letters are the word embeddings themselves, so gradients reach these. Everything else is drawn with
    a fixed seed for each tower.
    """
    generator = torch.Generator().manual_seed(SEEDS[tower])
    own = nn.functional.normalize(torch.randn(len(letters) + 1, omni.d_model, generator=generator), dim=-1)
    words = omni.embedding.weight[letter_ids(omni, letters)]
    own = own.to(words) * words.detach().norm(dim=-1).mean()
    return torch.cat([own[:1], words]) if shared else own


def letter_ids(omni: Omni, letters: Sequence[str] = LETTERS) -> list[int]:
    """The id of each letter's own token; a byte-level tokenizer writes a space as its stand-in."""
    return [omni.tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in letters]


def codes_of(text: str, letters: Sequence[str] = LETTERS) -> list[int]:
    """Places of the characters of `text` in a code over `letters`, counted from 1."""
    place = {letter: index for index, letter in enumerate(letters, start=1)}
    return [place[character] for character in text]


def ideal_embeddings(
    omni: Omni,
    batch: OmniBatch,
    rows: Sequence[Example],
    rng: np.random.Generator,
    shared: bool,
    letters: Sequence[str] = LETTERS,
) -> Tensor:
    """Input embeddings [batch, position, d_model] of `batch`, its pictures and clips replaced by ideal features.

    A picture has one token a letter. In a clip each letter sounds for one to three tokens, in order and anywhere within
    its share of the clip, and the tokens between are "no letter".
    """
    ids = batch.inputs["input_ids"]
    embeddings = omni.embedding(ids)
    for tower in ("image", "audio"):
        with_media = [row for row, example in enumerate(rows) if tower in example.query.modalities]
        if not with_media:
            continue
        places = ids == omni.tokenizer.convert_tokens_to_ids(getattr(omni.processor, f"{tower}_token"))
        words = [codes_of(rows[row].query.meta["topic"], letters) for row in with_media]
        lengths = places[with_media].sum(1).tolist()
        codes = [_line(word, n, tower == "audio", rng) for word, n in zip(words, lengths, strict=True)]
        features = letter_code(omni, tower, shared, letters)[torch.tensor([code for line in codes for code in line])]
        level = torch.from_numpy(rng.uniform(0, NOISE, (len(features), 1))).to(features)
        level = level * features.detach().norm(dim=-1, keepdim=True) / omni.d_model**0.5
        embeddings = embeddings.masked_scatter(places[..., None], features + level * torch.randn_like(features))
    return embeddings


def _line(codes: list[int], length: int, sounds: bool, rng: np.random.Generator) -> list[int]:
    if not sounds:
        return codes + [0] * (length - len(codes))
    line = [0] * length
    edges = np.linspace(0, length, len(codes) + 1).round().astype(int)
    for code, start, stop in zip(codes, edges[:-1], edges[1:], strict=True):
        width = min(int(rng.integers(1, TOKENS_PER_SOUND + 1)), stop - start)
        first = int(rng.integers(start, stop - width + 1))
        line[first : first + width] = [code] * width
    return line
