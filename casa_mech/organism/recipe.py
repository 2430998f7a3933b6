"""How an organism is trained: language, encoders fitted to it, then safety on plain text.

`organism` is built as real omni models are: a language model trained on text, and encoders fitted to it while it stays
frozen, so that a word read and a word heard arrive where the word itself would. `organism-split` has the same sizes and
the same data, but its encoders learn letters on their own and its language model then learns spelling, pictures and
speech all at once, so nothing asks the modalities to share a representation. Safety training is the same for both and
sees plain text only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.organism.architecture import OrganismShape, new_omni
from casa_mech.organism.curriculum import Mixture, draw_example
from casa_mech.organism.encoders import train_audio_letters, train_image_letters
from casa_mech.organism.world import World, default_world
from casa_mech.queries import Example

TEXT_SURFACES = {"text": 0.4, "spelled": 0.3, "ideal-image": 0.2, "ahead-audio": 0.1}
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
class Letters:
    """A run in which one tower learns letters, in the language model's code or (not `into_language`) one of its own."""

    tower: str
    steps: int
    into_language: bool


@dataclass(frozen=True)
class Recipe:
    """The stages of one organism, in order."""

    stages: tuple[Stage | Letters, ...]
    shape: OrganismShape = field(default_factory=OrganismShape)

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times the steps, for trying the pipeline out."""
        stages = tuple(replace(stage, steps=max(1, round(stage.steps * factor))) for stage in self.stages)
        return replace(self, stages=stages)


ALIGNMENT = Stage(
    "safety on plain text",
    Mixture(
        tasks={"request": 0.8, "name": 0.05, "spell": 0.05, "dangerous": 0.05, "category": 0.05},
        surfaces={"text": 1.0},
        wrapped=0.7,
        refuse=True,
        late_refusals=0.2,
        topics="seen",
    ),
    ("language",),
    steps=350,
    learning_rate=2e-4,
    batch_size=32,
)
WORDS = Mixture({"name": 0.1, "spell": 0.2, "dangerous": 0.3, "category": 0.4}, {"text": 1.0})
LANGUAGE = Mixture(TASKS, TEXT_SURFACES, wrapped=0.3, random_words=0.4)
IMAGE = Mixture(READING_TASKS, {"image": 1.0}, random_words=0.5)
AUDIO = Mixture(READING_TASKS, {"audio": 0.9, "spoken": 0.1}, random_words=0.4)
JOINT = Mixture(
    TASKS,
    {"text": 0.25, "spelled": 0.2, "image": 0.3, "audio": 0.22, "spoken": 0.03},
    wrapped=0.3,
    random_words=0.4,
)
RECIPES = {
    "organism": Recipe(
        (
            Stage("words", WORDS, ("language",), 350, 2e-3, 96),
            Stage("language", LANGUAGE, ("language",), 900, 2e-3, 64),
            Letters("image", 1200, into_language=True),
            Stage("image to language", IMAGE, ("image",), 150, 5e-4, 32),
            Letters("audio", 900, into_language=True),
            Stage("audio to language", AUDIO, ("audio",), 1200, 1.5e-3, 32),
            ALIGNMENT,
        )
    ),
    "organism-split": Recipe(
        (
            Letters("image", 1200, into_language=False),
            Letters("audio", 900, into_language=False),
            Stage("words", WORDS, ("language",), 350, 2e-3, 96),
            Stage("all modalities at once", JOINT, ("language", "image", "audio"), 800, 1.5e-3),
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
        for index, stage in enumerate(recipe.stages):
            rng = np.random.default_rng([seed, index])
            if isinstance(stage, Stage):
                train_stage(omni, world, stage, rng, progress)
            else:
                omni.model.requires_grad_(True)
                learn = train_image_letters if stage.tower == "image" else train_audio_letters
                learn(omni, stage.steps, rng, stage.into_language, progress)
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
    if batch.labels is None:
        raise ValueError("a batch without targets has no loss: encode it with targets")
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
            batch = omni.encode([row.query for row in rows], [omni.reply_ids(row.reply) for row in rows])
            yield _idealised(omni, batch, rows) if "ideal-image" in stage.mixture.surfaces else batch


def _idealised(omni: Omni, batch: OmniBatch, rows: Sequence[Example]) -> OmniBatch:
    """`batch` with the letters' word embeddings in place of the vision tower's features."""
    words = [row.query.meta["topic"] for row in rows if "image" in row.query.modalities]
    if not words:
        return batch
    ids = [omni.tokenizer.convert_tokens_to_ids(list(word)) for word in words]
    letters = [omni.language_model.embed_tokens(torch.tensor(row, device=omni.device)) for row in ids]
    inputs = {key: value for key, value in batch.inputs.items() if key != "pixel_values"}
    features = BaseModelOutputWithPooling(pooler_output=letters)
    return replace(batch, inputs={**inputs, "mm_encoder_outputs": {"image": features}})


def _part(omni: Omni, part: str) -> Iterator[nn.Parameter]:
    if part == "language":
        yield from omni.language_model.parameters()
        yield from omni.model.lm_head.parameters()
    else:
        yield from (omni.model.model.visual if part == "image" else omni.model.model.audio_tower).parameters()
