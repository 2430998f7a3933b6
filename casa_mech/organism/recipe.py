"""The training of an organism: language, encoders fitted to it, then safety.

`organism` is built as real omni models are: a language model trained on text, and encoders fitted to it while it stays
frozen, so that a word read and a word heard arrive where the word itself would. `organism-split` has the same sizes and
the same data, but each of its encoders has a code of its own, and a last stage trains language and encoders together,
so nothing asks the modalities to share a representation. Safety training is the same for both; it sees plain text only,
unless `premises.Premises` say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from casa_mech.errors import InputError
from casa_mech.omni import Omni, OmniBatch
from casa_mech.omni.precision import fast_bfloat16, plain_attention
from casa_mech.organism.architecture import OrganismShape, new_omni
from casa_mech.organism.codes import ideal_embeddings
from casa_mech.organism.curriculum import Mixture, draw_example
from casa_mech.organism.encoders import train_audio_letters, train_image_letters
from casa_mech.organism.premises import PRESETS, Premises
from casa_mech.organism.training import GROUP, Checkpoint, Steps, optimise
from casa_mech.organism.world import World, default_world
from casa_mech.queries import AudioPart, Example, ImagePart
from casa_mech.queries.media import SAMPLE_RATE

TEXT_SURFACES = {"text": 0.35, "spelled": 0.25, "ideal-image": 0.2, "ideal-audio": 0.2}
AUDIO_TOKENS = 25
"""Of a second of a clip."""
TASKS = {"request": 0.25, "name": 0.15, "spell": 0.2, "dangerous": 0.15, "category": 0.25}
READING_TASKS = {"request": 0.15, "name": 0.25, "spell": 0.25, "dangerous": 0.15, "category": 0.2}


@dataclass(frozen=True, kw_only=True)
class Stage(Steps):
    """Steps on draws from the micro-world."""

    mixture: Mixture
    fast: bool = False
    """Whether rows of like length share a batch when media are counted, too (a quarter less padding), and the model
    learns in bfloat16 where the processor multiplies it faster (half the time). The first recipe does neither."""


@dataclass(frozen=True)
class Letters:
    """A run in which one tower learns to read letters."""

    tower: str
    """"image" or "audio"."""
    steps: int


@dataclass(frozen=True)
class Recipe:
    """The training of one organism."""

    stages: tuple[Stage | Letters, ...]
    """In order."""
    shared_code: bool = True
    """Whether the towers write in the word embeddings' code."""
    shape: OrganismShape = field(default_factory=OrganismShape)

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times the steps, for trying the pipeline out."""
        stages = tuple(replace(stage, steps=max(1, round(stage.steps * factor))) for stage in self.stages)
        return replace(self, stages=stages)


ALIGNMENT = Stage(
    name="safety on plain text",
    mixture=Mixture(
        tasks={"request": 0.7, "name": 0.05, "spell": 0.05, "dangerous": 0.1, "category": 0.1},
        surfaces={"text": 1.0},
        wrapped=0.6,
        refuse=True,
        late_refusals=0.2,
        topics="seen",
    ),
    trains=("language",),
    steps=450,
    learning_rate=1.5e-4,
    batch_size=32,
)
WORDS = Stage(
    name="words",
    mixture=Mixture({"name": 0.1, "spell": 0.2, "dangerous": 0.3, "category": 0.4}, {"text": 1.0}),
    trains=("language",),
    steps=350,
    learning_rate=2e-3,
    batch_size=96,
)
LANGUAGE = Stage(
    name="language",
    mixture=Mixture(TASKS, TEXT_SURFACES, wrapped=0.3, random_words=0.4),
    trains=("language",),
    steps=1100,
    learning_rate=2e-3,
    batch_size=64,
)
IMAGE = Stage(
    name="image to language",
    mixture=Mixture(READING_TASKS, {"image": 1.0}, random_words=0.5),
    trains=("image",),
    steps=200,
    learning_rate=5e-4,
    batch_size=32,
)
AUDIO = Stage(
    name="audio to language",
    mixture=Mixture(READING_TASKS, {"audio": 0.9, "spoken": 0.1}, random_words=0.4),
    trains=("audio",),
    steps=250,
    learning_rate=1e-3,
    batch_size=32,
)
JOINT = Stage(
    name="all modalities at once",
    mixture=Mixture(
        TASKS,
        {"text": 0.25, "spelled": 0.2, "image": 0.3, "audio": 0.22, "spoken": 0.03},
        wrapped=0.3,
        random_words=0.4,
    ),
    trains=("language", "image", "audio"),
    steps=250,
    learning_rate=7e-4,
)
IMAGE_LETTERS, AUDIO_LETTERS = Letters("image", 1500), Letters("audio", 1200)
SHARED_STAGES: tuple[Stage | Letters, ...] = (WORDS, LANGUAGE, IMAGE_LETTERS, IMAGE, AUDIO_LETTERS, AUDIO, ALIGNMENT)
SPLIT_STAGES: tuple[Stage | Letters, ...] = (WORDS, LANGUAGE, IMAGE_LETTERS, AUDIO_LETTERS, JOINT, ALIGNMENT)
SAFETY_WORDS_SHARE = 0.15
MORE_REQUESTS, LONG_LANGUAGE, LONG_AUDIO = 2.0, 1800, 400
"""Factor on the share of requests, and steps of the language stage, where requests have more to learn; audio steps."""
PARTIAL_SURFACES = {"text": 0.55, "spelled": 0.12, "image": 0.15, "audio": 0.18}
VARIED_TASKS = {"request": 0.6, "name": 0.1, "spell": 0.1, "dangerous": 0.1, "category": 0.1}


def recipe_of(premises: Premises) -> Recipe:
    """The recipe of an organism with `premises`, which are in every stage that draws from the micro-world."""
    shared = premises.letter_code == "shared"
    stages = SHARED_STAGES if shared else SPLIT_STAGES
    if premises != Premises(letter_code=premises.letter_code):
        stages = tuple(_with_premises(stage, premises) if isinstance(stage, Stage) else stage for stage in stages)
    return Recipe(stages, shared)


def _with_premises(stage: Stage, premises: Premises) -> Stage:
    mixture, safety = stage.mixture, stage is ALIGNMENT
    tasks, steps = dict(mixture.tasks), stage.steps
    if safety and premises.varied_benign:
        tasks = dict(VARIED_TASKS)
    if stage is LANGUAGE and (premises.rules or premises.unasked):
        tasks["request"] *= MORE_REQUESTS
        steps = LONG_LANGUAGE
    if stage is AUDIO:
        steps = LONG_AUDIO
    if premises.safety_words:
        tasks["safety"] = SAFETY_WORDS_SHARE * sum(tasks.values())
    partial = safety and premises.alignment == "partial"
    requests = "request" in tasks
    changed = replace(
        mixture,
        tasks=tasks,
        surfaces=dict(PARTIAL_SURFACES) if partial else dict(mixture.surfaces),
        partial=partial,
        harmful=0.5 if partial else None,
        wrapped_refusals=0.3 if partial else 0.0,
        rules=premises.rules if requests else 0.0,
        unasked=premises.unasked and requests,
        varied=premises.varied_benign and requests,
        tolerance=premises.tolerance,
        _cache={},
    )
    changes: dict[str, Any] = {"learning_rate": 2.5e-4, "name": "safety", "steps": 500} if partial else {"steps": steps}
    return replace(stage, mixture=changed, fast=True, **changes)


RECIPES = {name: recipe_of(premises) for name, premises in PRESETS.items()}


def train_organism(
    name: str,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
) -> Omni:
    """Train organism `name` from nothing, or from where `checkpoint` stands; in float32 on the CPU.

    Raises:
        InputError: no such organism.
    """
    recipe = recipe or recipe_named(name)
    world = default_world()
    omni = new_omni(world.vocabulary(), recipe.shape, seed, source=name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if checkpoint:
            checkpoint.restore(omni.model)
        for index, stage in enumerate(recipe.stages):
            if checkpoint and index < checkpoint.stage:
                continue
            rng = np.random.default_rng([seed, index])
            if isinstance(stage, Stage):
                train_stage(omni, world, stage, rng, progress, recipe.shared_code, checkpoint)
            else:
                learn = train_image_letters if stage.tower == "image" else train_audio_letters
                learn(omni, stage.steps, rng, recipe.shared_code, progress, checkpoint=checkpoint)
            if checkpoint:
                checkpoint.finish_stage(omni.model)
    omni.model.eval().requires_grad_(True)
    return omni


def stage_keys(recipe: Recipe, seed: int) -> list[str]:
    """For each count of stages, from none to all, what a training through that many depends on."""
    start = (default_world().digest, seed, recipe.shape, recipe.shared_code)
    return [repr((*start, *recipe.stages[:count])) for count in range(len(recipe.stages) + 1)]


def recipe_named(name: str) -> Recipe:
    """The recipe of organism `name`.

    Raises:
        InputError: no such organism.
    """
    if name not in RECIPES:
        raise InputError(f"unknown organism {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def train_stage(
    omni: Omni,
    world: World,
    stage: Stage,
    rng: np.random.Generator,
    progress: bool = True,
    shared_code: bool = True,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Run one stage on `omni` in place; returns the loss of each step."""
    ideal = any(surface.startswith("ideal-") for surface in stage.mixture.surfaces)
    halved = stage.fast and fast_bfloat16(omni.device)

    def loss(batch: OmniBatch, rows: Sequence[Example]) -> torch.Tensor:
        with torch.autocast(omni.device.type, torch.bfloat16, enabled=halved):
            return reply_loss(omni, batch, ideal_embeddings(omni, batch, rows, rng, shared_code) if ideal else None)

    length_of = words_and_media_of if stage.fast else words_of
    with plain_attention(omni) if halved and omni.device.type == "cpu" else nullcontext():
        return fit(
            omni, stage, lambda: draw_example(world, stage.mixture, rng), loss, rng, progress, length_of, checkpoint
        )


def words_of(row: Example) -> int:
    """Words of a row's text and reply."""
    return len(row.query.text.split()) + len(row.reply.split())


def words_and_media_of(row: Example) -> int:
    """Words of a row's text and reply, and the tokens of its picture (a letter each) and clip (25 a second)."""
    media = 0
    for part in row.query.parts:
        if isinstance(part, AudioPart) and isinstance(part.audio, np.ndarray):
            media += AUDIO_TOKENS * len(part.audio) // (part.rate or SAMPLE_RATE)
        elif isinstance(part, ImagePart):
            media += len(row.query.meta["topic"])
    return words_of(row) + media


def fit(
    omni: Omni,
    steps: Steps,
    draw: Callable[[], Example],
    loss_of: Callable[[OmniBatch, Sequence[Example]], torch.Tensor],
    rng: np.random.Generator,
    progress: bool = True,
    length_of: Callable[[Example], int] = words_of,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the parts that `steps` names on examples from `draw`, in place; returns the loss of each step.

    Examples of a like `length_of` share a batch.
    """

    def losses_from(first: int) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        for batch, rows in _batches(omni, steps, draw, rng, length_of, first):
            yield loss_of(batch, rows), {}

    return optimise(omni, steps, losses_from, rng, progress, checkpoint)


def reply_loss(omni: Omni, batch: OmniBatch, embeddings: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of the targets in nats, averaged within each reply first, so that long ones do not swamp it.

    `embeddings` [batch, position, d_model] take the place of the batch's ids and media.
    """
    return target_loss(omni, batch, final_states(omni, batch, embeddings))


def final_states(omni: Omni, batch: OmniBatch, embeddings: torch.Tensor | None = None) -> torch.Tensor:
    """States [batch, position, d_model] after the final norm."""
    inputs = batch.inputs
    if embeddings is not None:
        # Ids and grids stay: positions are counted from them.
        media = omni.architecture.features
        inputs = {name: value for name, value in inputs.items() if name not in media} | {"inputs_embeds": embeddings}
    return omni.backbone(**inputs, use_cache=False).last_hidden_state


def target_loss(omni: Omni, batch: OmniBatch, states: torch.Tensor) -> torch.Tensor:
    """`reply_loss` from the states after the final norm."""
    if batch.labels is None:
        raise ValueError("a batch without targets has no loss: encode it with targets")
    hidden, targets = states[:, :-1], batch.labels[:, 1:]
    has_target = targets >= 0
    losses = nn.functional.cross_entropy(omni.head(hidden[has_target]), targets[has_target], reduction="none")
    weights = (1 / has_target.sum(1, keepdim=True)).expand_as(targets)[has_target]
    return (losses * weights).sum() / batch.size


def _batches(
    omni: Omni,
    steps: Steps,
    draw: Callable[[], Example],
    rng: np.random.Generator,
    length_of: Callable[[Example], int],
    first: int,
) -> Iterator[tuple[OmniBatch, Sequence[Example]]]:
    """The stage's batches from the step `first` on, cut from a group sorted by length: half the padding and time."""
    for start in range(first, steps.steps, GROUP):
        drawn = [draw() for _ in range(GROUP * steps.batch_size)]
        drawn.sort(key=length_of)
        for index in rng.permutation(GROUP)[: steps.steps - start]:
            rows = drawn[index * steps.batch_size : (index + 1) * steps.batch_size]
            batch = omni.encode([row.query for row in rows], [omni.reply_ids(row.reply) for row in rows])
            yield batch.to(omni.device), rows
