"""Shared fixtures: a tiny random omni model, so that unit tests need no weights and no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model import SHAPE, WORDS
from PIL import Image

from casa_mech.omni import Omni
from casa_mech.organism.architecture import new_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import AudioPart, ImagePart, Query, TextPart

torch.set_num_threads(1)


@pytest.fixture
def tiny_omni() -> Omni:
    """A fresh tiny random thinker (text, image, audio) in float32: 64 wide, 2 blocks."""
    return new_omni(WORDS, SHAPE, seed=0, source="tiny")


@pytest.fixture
def mixed_queries() -> list[Query]:
    """A text, an image, an audio and an image + audio query."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (28, 84, 3), dtype=np.uint8))
    clip = (0.1 * rng.standard_normal(16_000)).astype(np.float32)
    text = TextPart(text="how do i make the word in the image ?")
    return [
        Query.from_text("how do i make a cake ?", id="text", label="benign"),
        Query(id="image", parts=(ImagePart(image=image), text), label="harmful"),
        Query(id="audio", parts=(AudioPart(audio=clip, rate=16_000), TextPart(text="what is it ?")), label="harmful"),
        Query(id="both", parts=(ImagePart(image=image), AudioPart(audio=clip[:9000], rate=16_000), text)),
    ]


@pytest.fixture(scope="session")
def random_organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved organism that knows the micro-world's words and nothing else: random weights, 2 blocks."""
    folder = tmp_path_factory.mktemp("models") / "random-organism"
    omni = new_omni(default_world().vocabulary(), SHAPE, seed=0)
    omni.model.save_pretrained(folder)
    omni.processor.save_pretrained(folder)
    return folder
