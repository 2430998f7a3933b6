"""Train the larger sibling: language from the user's prompts, towers fitted to it, then safety on plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from casa_mech.files import write_text
from casa_mech.omni import GenerationSettings, Omni, OmniBatch
from casa_mech.omni.precision import fast_bfloat16
from casa_mech.organism.architecture import OrganismShape, build_bpe_tokenizer, new_omni
from casa_mech.organism.build import build_into, build_key
from casa_mech.organism.codes import ideal_embeddings
from casa_mech.organism.corpus import ANSWER, CHARACTERS, PROMPTS, REFUSALS, Corpus, corpus_record, script_of
from casa_mech.organism.encoders import train_audio_letters, train_image_letters
from casa_mech.organism.recipe import final_states, fit, target_loss
from casa_mech.organism.training import Checkpoint, Steps
from casa_mech.queries import Example, Label

SHAPE = OrganismShape(d_model=256, layers=4, heads=8, kv_heads=4, d_mlp=704, rope_theta=1000.0, audio_width=192)
VOCABULARY = 8000
CARD = "corpus.json"
LANGUAGE = Steps(name="language", trains=("language",), steps=1800, learning_rate=1.5e-3, batch_size=64)
LETTERS = {"image": (train_image_letters, 600), "audio": (train_audio_letters, 900)}
"""The letters stage of each tower and its steps."""
IMAGE = Steps(name="image to language", trains=("image",), steps=100, learning_rate=5e-4, batch_size=16)
AUDIO = Steps(name="audio to language", trains=("audio",), steps=150, learning_rate=5e-4, batch_size=16)
SAFETY = Steps(name="safety on plain text", trains=("language",), steps=1000, learning_rate=4e-4, batch_size=48)
STAGES = 6
"""Of `train_sibling`, each of which can be the last one before a stop."""
SURFACES = ("text", "image", "audio")
SURFACE_SHARES = (0.76, 0.14, 0.1)
TASK_SHARES = {"request": 0.4, "repeat": 0.4, "dangerous": 0.2}
HIDDEN = {"language": 0.15, "safety": 0.5}
"""Share of the text's tokens that a step does not see: so no single word, and no style, may carry the decision."""


def train_sibling(
    corpus: Corpus,
    seed: int = 0,
    scale: float = 1.0,
    device: str = "cpu",
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
) -> Omni:
    """Train a sibling (about 9M parameters) on `corpus`, from nothing or from where `checkpoint` stands, in float32.

    Args:
        corpus: see `corpus.read_corpus`.
        seed: of the weights and every draw.
        scale: factor on the number of steps, for trying the pipeline out.
        device: where to train.
        progress: whether to draw progress bars.
        checkpoint: where the training's state is kept.
    """
    requests = [text for by_surface in PROMPTS.values() for text in by_surface.values()]
    texts = [*corpus.harmful, *corpus.benign, ANSWER, *REFUSALS, *requests, "yes", "no"]
    omni = new_omni(build_bpe_tokenizer([*texts, "system user assistant"], VOCABULARY), SHAPE, seed, "corpus")
    omni.model.to(device)
    script = script_of(corpus)

    def scaled(steps: int) -> int:
        return max(1, round(steps * scale))

    def examples(
        steps: Steps, surfaces: Sequence[float], hidden: float = 0.0, language: bool = False, refuse: bool = False
    ) -> None:
        rng = np.random.default_rng([seed, *steps.name.encode()])
        loss = _loss(omni, rng, hidden, language)
        settings = replace(steps, steps=scaled(steps.steps))
        fit(omni, settings, lambda: _draw(corpus, rng, surfaces, refuse), loss, rng, progress, _tokens_of, checkpoint)

    def letters(tower: str) -> None:
        rng = np.random.default_rng([seed, *tower.encode()])
        learn, steps = LETTERS[tower]
        learn(omni, scaled(steps), rng, True, progress, batch_size=16, script=script, checkpoint=checkpoint)

    stages: tuple[Callable[[], None], ...] = (
        lambda: examples(LANGUAGE, SURFACE_SHARES, HIDDEN["language"], language=True),
        lambda: letters("image"),
        lambda: examples(IMAGE, (0.0, 1.0, 0.0)),
        lambda: letters("audio"),
        lambda: examples(AUDIO, (0.0, 0.0, 1.0)),
        lambda: examples(SAFETY, (1.0, 0.0, 0.0), HIDDEN["safety"], refuse=True),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if checkpoint:
            checkpoint.restore(omni.model)
        for stage in stages[checkpoint.stage if checkpoint else 0 :]:
            stage()
            if checkpoint:
                checkpoint.finish_stage(omni.model)
    omni.model.eval().requires_grad_(True)
    return omni


def build_sibling(
    corpus: Corpus,
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    n: int = 100,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Train a sibling, measure what it reads, and write weights and `corpus.json` to `out`, all or nothing.

    A build that was stopped goes on when it is started again with the same arguments.

    Raises:
        RunError: `out` cannot be written, holds other files or another build, or another build is writing it.
    """
    keys = [repr((corpus.harmful, corpus.benign, seed, scale, SHAPE, VOCABULARY))] * (STAGES + 1)

    def train(checkpoint: Checkpoint) -> Omni:
        return train_sibling(corpus, seed, scale, device, progress, checkpoint)

    def measure(saved: Omni, seconds: float) -> dict[str, Any]:
        return {
            "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
            "corpus": corpus_record(corpus),
            "seed": seed,
            "scale": scale,
            "seconds": round(seconds),
            "reading": reading(saved, corpus, n, seed),
            "build": {"key": build_key(keys)},
        }

    def write_record(record: dict[str, Any], folder: Path) -> None:
        write_text(folder / CARD, json.dumps(record, indent=1) + "\n")

    return build_into(out, keys, CARD, train, measure, write_record, device=device)


def reading(omni: Omni, corpus: Corpus, n: int, seed: int) -> list[dict[str, Any]]:
    """Character error rate of repeating `n` corpus prompts on each surface, with a bootstrap interval over prompts.

    Errors are insertions, deletions and substitutions as a share of the prompts' characters; the clips and pictures
    are fresh draws of prompts that the towers were trained on.
    """
    rows = []
    for surface in SURFACES:
        rng = np.random.default_rng([seed, 17, *surface.encode()])
        pool = replace(corpus, harmful=corpus.readable("harmful"), benign=corpus.readable("benign"))
        labels: tuple[Label, Label] = ("harmful", "benign")
        drawn = [pool.draw(labels[index % 2], surface, "repeat", rng, False) for index in range(n)]
        replies = omni.generate([row.query for row in drawn], GenerationSettings(max_new_tokens=32, batch_size=25))
        targets = [row.reply.lower() for row in drawn]
        errors = np.array(
            [
                Levenshtein.distance(reply.text.strip().lower(), text)
                for reply, text in zip(replies, targets, strict=True)
            ]
        )
        lengths = np.array([len(text) for text in targets])
        picks = rng.integers(n, size=(1000, n))
        low, high = np.quantile(errors[picks].sum(1) / lengths[picks].sum(1), [0.025, 0.975])
        rate = float(errors.sum() / lengths.sum())
        row = {"measure": "character_error_rate", "surface": surface, "n": n}
        rows.append(row | {"value": rate, "low": float(low), "high": float(high)})
    return rows


def _draw(corpus: Corpus, rng: np.random.Generator, surfaces: Sequence[float], refuse: bool) -> Example:
    surface = SURFACES[int(rng.choice(len(SURFACES), p=surfaces))]
    # In safety training every second request is harmful, else in proportion to nothing: harmful prompts are few.
    label: Label = "harmful" if rng.random() < (0.5 if refuse else 0.3) else "benign"
    shares = {"request": 0.9, "repeat": 0.05, "dangerous": 0.05} if refuse else TASK_SHARES
    task = str(rng.choice(list(shares), p=list(shares.values())))
    return corpus.draw(label, surface, task, rng, refuse)


def _tokens_of(row: Example) -> int:
    """About how long a row is: a picture has a token a letter, a clip about 1.5."""
    media = {"image": 4, "audio": 6}.get(row.query.meta["surface"], 0)
    return media * len(row.query.meta["topic"]) + len(row.query.text) + len(row.reply)


def _loss(
    omni: Omni, rng: np.random.Generator, hidden: float, language: bool
) -> Callable[[OmniBatch, Sequence[Example]], Tensor]:
    """The replies' loss; while the language is learned that of the typed prompts too, and media have ideal features.

    `hidden`: share of the text's tokens whose embeddings are zero. The forward runs in bfloat16 where the device
    multiplies it faster than float32.
    """

    def loss(batch: OmniBatch, rows: Sequence[Example]) -> Tensor:
        with torch.autocast(omni.device.type, torch.bfloat16, enabled=fast_bfloat16(omni.device)):
            states = final_states(omni, batch, _embeddings(omni, batch, rows, rng, hidden, language)).float()
            replies = target_loss(omni, batch, states)
            return replies + _prompt_loss(omni, batch, states) if language else replies

    return loss


def _embeddings(
    omni: Omni, batch: OmniBatch, rows: Sequence[Example], rng: np.random.Generator, hidden: float, ideal: bool
) -> Tensor | None:
    """Input embeddings [batch, position, d_model] with text hidden; None where the batch's own serve as they are."""
    if not (ideal or hidden):
        return None
    ids, text = batch.inputs["input_ids"], batch.modality["text"]
    if ideal:
        embeddings = ideal_embeddings(omni, batch, rows, rng, True, CHARACTERS)
    else:
        embeddings = omni.embedding(ids)
    hide = text & (torch.rand(text.shape, device=text.device) < hidden)
    return embeddings.masked_fill(hide[..., None], 0.0)


def _prompt_loss(omni: Omni, batch: OmniBatch, states: Tensor) -> Tensor:
    """Cross-entropy in nats of the prompts' own tokens, which teaches the model the language."""
    text = batch.modality["text"][:, 1:]
    targets = batch.inputs["input_ids"][:, 1:][text]
    return nn.functional.cross_entropy(omni.head(states[:, :-1][text]), targets)
