"""How an organism is trained: encoders, language, alignment of the encoders, then safety on plain text.

`organism` is built as real omni models are: encoders trained on their own to tell letters apart, a language model
trained on text, and the encoders then fitted to the frozen language model, so that a word read and a word heard arrive
where the word itself would. `organism-split` has the same encoders, sizes and data, but its language model learns text,
pictures and speech all at once, so nothing asks the modalities to share a representation. Safety training is the same
for both and sees plain text only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.organism.architecture import OrganismShape, new_omni
from casa_mech.organism.curriculum import Mixture, draw_example
from casa_mech.organism.encoders import train_audio_letters, train_image_letters
from casa_mech.organism.world import World, default_world

TEXT_SURFACES = {"text": 0.4, "spelled": 0.3, "ahead-image": 0.15, "ahead-audio": 0.15}
TASKS = {"request": 0.25, "name": 0.15, "spell": 0.2, "dangerous": 0.15, "category": 0.25}
READING_TASKS = {"request": 0.15, "name": 0.25, "spell": 0.25, "dangerous": 0.15, "category": 0.2}


@dataclass(frozen=True)
class Stage:
    """A run of steps: what is drawn, which part learns, for how long and how fast."""

    name: str
    mixture: Mixture
    trains: tuple[str, ...]
    steps: int
    learning_rate: float
    batch_size: int = 48
    warm_up: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """The stages of one organism, after its encoders have learned letters for `image_steps` and `audio_steps`."""

    stages: tuple[Stage, ...]
    shape: OrganismShape = field(default_factory=OrganismShape)
    image_steps: int = 900
    audio_steps: int = 900

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times the steps, for tests of the pipeline."""
        stages = tuple(replace(stage, steps=max(1, round(stage.steps * factor))) for stage in self.stages)
        image, audio = (max(1, round(steps * factor)) for steps in (self.image_steps, self.audio_steps))
        return replace(self, stages=stages, image_steps=image, audio_steps=audio)


ALIGNMENT = Stage(
    "safety on plain text",
    Mixture(
        tasks={"request": 0.8, "name": 0.05, "spell": 0.05, "dangerous": 0.05, "category": 0.05},
        surfaces={"text": 1.0},
        wrapped=0.3,
        refuse=True,
        late_refusals=0.2,
        topics="seen",
    ),
    ("language",),
    steps=200,
    learning_rate=3e-4,
)
WORDS = Mixture({"name": 0.1, "spell": 0.2, "dangerous": 0.3, "category": 0.4}, {"text": 1.0})
LANGUAGE = Mixture(TASKS, TEXT_SURFACES, wrapped=0.3, random_words=0.4)
IMAGE = Mixture(READING_TASKS, {"image": 1.0}, random_words=0.5)
AUDIO = Mixture(READING_TASKS, {"audio": 0.85, "spoken": 0.15}, random_words=0.5)
JOINT = Mixture(
    TASKS,
    {"text": 0.3, "spelled": 0.15, "image": 0.25, "audio": 0.25, "spoken": 0.05},
    wrapped=0.3,
    random_words=0.4,
)
RECIPES = {
    "organism": Recipe(
        (
            Stage("words", WORDS, ("language",), 350, 2e-3, 96),
            Stage("language", LANGUAGE, ("language",), 900, 2e-3, 64),
            Stage("image to language", IMAGE, ("image",), 700, 1e-3, 32),
            Stage("audio to language", AUDIO, ("audio",), 700, 1e-3, 32),
            ALIGNMENT,
        )
    ),
    "organism-split": Recipe(
        (
            Stage("all modalities at once", JOINT, ("language", "image", "audio"), 2400, 2e-3),
            ALIGNMENT,
        )
    ),
}


def train_organism(name: str, seed: int = 0, recipe: Recipe | None = None, progress: bool = True) -> Omni:
    """Train organism `name` from nothing and return it, in float32 on the CPU.

    Raises:
        InputError: no such organism.
    """
    if name not in RECIPES:
        raise InputError(f"unknown organism {name!r}; there are {', '.join(RECIPES)}")
    recipe = recipe or RECIPES[name]
    world = default_world()
    omni = new_omni(world.vocabulary(), recipe.shape, seed, source=name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train_image_letters(omni, recipe.image_steps, np.random.default_rng([seed, 100]), progress)
        train_audio_letters(omni, recipe.audio_steps, np.random.default_rng([seed, 101]), progress)
        for index, stage in enumerate(recipe.stages):
            train_stage(omni, world, stage, np.random.default_rng([seed, index]), progress)
    omni.model.eval().requires_grad_(True)
    return omni


def train_stage(omni: Omni, world: World, stage: Stage, rng: np.random.Generator, progress: bool = True) -> list[float]:
    """Run one stage on `omni` in place; returns the loss of each step."""
    omni.model.requires_grad_(False).train()
    learning = [parameter for part in stage.trains for parameter in _part(omni, part)]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning, lr=stage.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.learning_rate, total_steps=stage.steps, pct_start=stage.warm_up
    )
    losses: list[float] = []
    with tqdm(total=stage.steps, desc=stage.name, unit="step", disable=not progress) as bar:
        for batch in _batches(omni, world, stage, rng):
            loss = reply_loss(omni, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    return losses


def reply_loss(omni: Omni, batch: OmniBatch) -> torch.Tensor:
    """Cross-entropy of the targets in nats, averaged within each reply first, so that long ones do not swamp it."""
    hidden = omni.model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = batch.labels[:, 1:]
    taken = wanted >= 0
    losses = nn.functional.cross_entropy(omni.model.lm_head(hidden[taken]), wanted[taken], reduction="none")
    weights = (1 / taken.sum(1, keepdim=True)).expand_as(wanted)[taken]
    return (losses * weights).sum() / batch.size


def _batches(omni: Omni, world: World, stage: Stage, rng: np.random.Generator) -> Iterator[OmniBatch]:
    """The stage's batches, cut from four at a time sorted by length: half the padding, half the time."""
    for start in range(0, stage.steps, 4):
        drawn = [draw_example(world, stage.mixture, rng) for _ in range(4 * stage.batch_size)]
        drawn.sort(key=lambda row: len(row.query.text.split()) + len(row.reply.split()))
        for index in rng.permutation(4)[: stage.steps - start]:
            rows = drawn[index * stage.batch_size : (index + 1) * stage.batch_size]
            yield omni.encode([row.query for row in rows], [omni.reply_ids(row.reply) for row in rows])


def _part(omni: Omni, part: str) -> Iterator[nn.Parameter]:
    if part == "language":
        yield from omni.language_model.parameters()
        yield from omni.model.lm_head.parameters()
    else:
        yield from (omni.model.model.visual if part == "image" else omni.model.model.audio_tower).parameters()
