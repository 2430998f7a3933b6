"""Projected gradient descent on a picture's pixels or a clip's samples (Madry et al., arXiv 1706.06083).

The optimiser never sees an input that could not be a file: every forward is given pixels rounded to 8 bits and samples
rounded to 16, and the gradient passes the rounding as if it were not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from casa_mech.attacks.seeding import query_rng
from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.judging import Judge
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.omni.chat import media_parts
from casa_mech.queries import AudioPart, ImagePart, Query
from casa_mech.queries.media import SAMPLE_RATE, load_audio, load_image
from casa_mech.whitebox.front_end import log_mel, patches, processed_picture
from casa_mech.whitebox.gradient import GradientSettings, run_attack, start_purpose
from casa_mech.whitebox.objective import Objective, check_queries
from casa_mech.whitebox.results import AttackResult, Measured

Medium = Literal["image", "audio"]
RANGE: Mapping[Medium, tuple[int, int]] = {"image": (0, 255), "audio": (-32768, 32767)}
"""The whole numbers that a file can hold; media are in these levels throughout."""
FULL: Mapping[Medium, int] = {"image": 255, "audio": 32768}
"""Levels of full scale, of which a budget is a share."""
_WALK = 2.5
"""Budgets that all steps together can walk: enough to cross the box and turn round."""


class PgdSettings(GradientSettings):
    """One run of projected gradient descent."""

    budget: float = Field(gt=0, le=1)
    """The largest change of a pixel or sample, as a share of full scale; 8 / 255, say."""
    step_size: float | None = Field(default=None, gt=0)
    """Share of the budget that a step walks on average, 2.5 / steps when not given; steps shrink evenly to nothing."""
    random_start: bool = False
    """Begin anywhere within the budget instead of at the clean input, already at the first start."""

    def levels(self, medium: Medium) -> int:
        """The budget in whole levels of the file.

        Raises:
            InputError: less than one level.
        """
        levels = int(self.budget * FULL[medium] + 1e-6)
        if levels < 1:
            bits = {"image": 8, "audio": 16}[medium]
            raise InputError(
                f"budget={self.budget:g} is below one {bits}-bit level (1/{FULL[medium]}): nothing can change"
            )
        return levels


def pgd_pixels(
    casa: Casa,
    queries: Sequence[Query],
    settings: PgdSettings,
    judge: Judge | None = None,
    generation: GenerationSettings = GenerationSettings(),
    before: Sequence[Measured] | None = None,
) -> list[AttackResult]:
    """Change the pixels of the pictures in each query's last turn.

    The budget holds at the size at which the model sees the picture: what is larger or smaller is resized first.

    Args:
        casa: the gate on its model; it is as it was afterwards.
        queries: each with a picture; text and clips are left alone.
        settings: budget, aim and steps.
        judge: of the replies; the keyword judge, an upper bound, when not given.
        generation: how the replies that are measured are generated.
        before: the clean queries, measured (see `measure`), where that was done already.

    Returns:
        For each of `settings.reported` a result for each query, in their order.

    Raises:
        InputError: a query without a picture, and what `check_queries` refuses.
    """
    return _attack(casa, queries, "image", settings, judge, generation, before)


def pgd_waveform(
    casa: Casa,
    queries: Sequence[Query],
    settings: PgdSettings,
    judge: Judge | None = None,
    generation: GenerationSettings = GenerationSettings(),
    before: Sequence[Measured] | None = None,
) -> list[AttackResult]:
    """Change the samples of the clips in each query's last turn; mono, 16 kHz, 16 bits. As `pgd_pixels` otherwise.

    Raises:
        InputError: a query without a clip, and what `check_queries` refuses.
    """
    return _attack(casa, queries, "audio", settings, judge, generation, before)


def _attack(
    casa: Casa,
    queries: Sequence[Query],
    medium: Medium,
    settings: PgdSettings,
    judge: Judge | None,
    generation: GenerationSettings,
    before: Sequence[Measured] | None,
) -> list[AttackResult]:
    check_queries(queries, settings.aim)
    for query in queries:
        if medium not in query.modalities:
            thing, way = {"image": ("picture", "'image' or 'figstep'"), "audio": ("clip", "'audio' or 'spoken'")}[
                medium
            ]
            raise InputError(f"query {query.id!r} has no {thing} to change: make one first, with the attack {way}")
    budget = settings.levels(medium)

    def optimise(group: Sequence[Query], start: int) -> tuple[list[list[Query]], Tensor]:
        examples, margins = _optimise(casa, group, medium, settings, budget, start)
        return [
            [_with_media(query, medium, levels) for query, levels in zip(group, reported, strict=True)]
            for reported in examples
        ], margins

    return run_attack(
        casa, queries, settings, optimise, attack=f"pgd-{medium}", budget=settings.budget, judge=judge,
        generation=generation, before=before,
    )  # fmt: skip


@dataclass(frozen=True)
class _Media:
    """All pictures or clips of some queries."""

    clean: list[Tensor]
    """In levels, as floats: [height, width, 3] or [sample]."""
    owner: list[int]
    """The row of the query whose last turn each is in; -1 for those of earlier turns, which are not changed."""


def _load(omni: Omni, queries: Sequence[Query], medium: Medium) -> _Media:
    clean, owner = [], []
    for row, query in enumerate(queries):
        parts = list(media_parts(query))
        first_own = len(parts) - sum(part.kind != "text" for part in query.parts)
        for position, part in enumerate(parts):
            if isinstance(part, ImagePart) and medium == "image":
                picture = load_image(part, f"query {query.id}")
                levels = processed_picture(omni.processor.image_processor, picture).astype(np.float32)
            elif isinstance(part, AudioPart) and medium == "audio":
                levels = np.rint(load_audio(part, f"query {query.id}") * FULL["audio"])
            else:
                continue
            clean.append(torch.tensor(levels, dtype=torch.float32, device=omni.device).clamp(*RANGE[medium]))
            owner.append(row if position >= first_own else -1)
    return _Media(clean, owner)


def _features(omni: Omni, levels: Sequence[Tensor], medium: Medium) -> Tensor:
    if medium == "image":
        return patches(omni.processor.image_processor, levels).to(omni.dtype)
    return log_mel(omni.processor.feature_extractor, [clip / FULL["audio"] for clip in levels]).to(omni.dtype)


def _optimise(
    casa: Casa, queries: Sequence[Query], medium: Medium, settings: PgdSettings, budget: int, start: int
) -> tuple[list[list[list[Tensor]]], Tensor]:
    """The best examples after each of `settings.reported` steps, [report][query][medium] in levels, and the margins of
    all steps [step, query]."""
    omni = casa.omni
    media = _load(omni, queries, medium)
    objective = Objective(casa, queries, settings.aim, settings.opening_tokens)
    last_turn = [row >= 0 for row in media.owner]
    rngs = _rngs(queries, media, settings, start)
    anywhere = settings.random_start or start > 0
    moved = [_start(clean, budget, rng) if anywhere else clean for clean, rng in zip(media.clean, rngs, strict=True)]
    stride = budget * (settings.step_size or _WALK / settings.steps)
    best = [clean.clone() for clean in media.clean]
    lowest = torch.full((len(queries),), torch.inf, device=omni.device)
    reports, margins = [], []
    features = omni.architecture.towers[medium].features
    with objective.running():
        for step in range(settings.steps + 1):
            last = step == settings.steps
            leaves = [level.detach().requires_grad_(not last) for level in moved]
            rounded = [leaf + (leaf.round() - leaf).detach() for leaf in leaves]
            inputs = {**objective.batch.inputs, features: _features(omni, rounded, medium)}
            losses = objective(replace(objective.batch, inputs=inputs), () if last else leaves, watch=settings.watch)
            margins.append(losses.margin.cpu())
            better = losses.value < lowest
            lowest = torch.where(better, losses.value, lowest)
            best = [
                level.detach() if row >= 0 and better[row] else previous
                for level, previous, row in zip(rounded, best, media.owner, strict=True)
            ]
            if step in settings.reported:
                reports.append([[level for level, row in zip(best, media.owner, strict=True) if row == query]
                                for query in range(len(queries))])  # fmt: skip
            if last:
                break
            # A wide box needs wide steps to cross it, and small ones to end anywhere but in its corners.
            shrunk = stride * (2 - (2 * step + 1) / settings.steps)
            moved = [
                _stepped(leaf.detach(), slope, clean, budget, shrunk, RANGE[medium]) if in_last_turn else clean
                for leaf, slope, clean, in_last_turn in zip(leaves, losses.slopes, media.clean, last_turn, strict=True)
            ]
    return reports, torch.stack(margins)


def _rngs(
    queries: Sequence[Query], media: _Media, settings: PgdSettings, start: int
) -> list[np.random.Generator | None]:
    """A generator for each medium, those of one query sharing one; None for what is not changed."""
    purpose = start_purpose("pgd", start)
    by_row = {row: query_rng(queries[row], settings.seed, purpose) for row in set(media.owner) if row >= 0}
    return [by_row.get(row) for row in media.owner]


def _start(clean: Tensor, budget: int, rng: np.random.Generator | None) -> Tensor:
    """A place within the budget around `clean`, which is not changed without a generator."""
    if rng is None:
        return clean
    return clean + torch.tensor(
        rng.uniform(-budget, budget, tuple(clean.shape)), dtype=clean.dtype, device=clean.device
    )


def _stepped(level: Tensor, slope: Tensor, clean: Tensor, budget: int, stride: float, ends: tuple[int, int]) -> Tensor:
    """`level` a step of `stride` down its slope's sign, within the budget around `clean` and the file's range."""
    stepped = level - stride * slope.sign()
    return torch.minimum(torch.maximum(stepped, clean - budget), clean + budget).clamp(*ends)


def _with_media(query: Query, medium: Medium, levels: Sequence[Tensor]) -> Query:
    """`query` with its pictures or clips exchanged for `levels`, as arrays that a file holds exactly."""
    remaining = iter(levels)
    parts = []
    for part in query.parts:
        if isinstance(part, ImagePart) and medium == "image":
            part = ImagePart(image=next(remaining).round().to(torch.uint8).cpu().numpy())
        elif isinstance(part, AudioPart) and medium == "audio":
            samples = (next(remaining).round() / FULL["audio"]).cpu().numpy().astype(np.float32)
            part = AudioPart(audio=samples, rate=SAMPLE_RATE)
        parts.append(part)
    return query.model_copy(update={"parts": tuple(parts)})
