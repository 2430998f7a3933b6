"""MoRAS: steer a reply's first positions towards unsafe prototypes, by risk (arXiv 2510.13698; docs/method.md §3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from casa_mech.defenses.base import Defense, DefenseSettings, Description
from casa_mech.defenses.media import need_image
from casa_mech.defenses.prompts import defense_text, with_text_before
from casa_mech.errors import InputError
from casa_mech.identity import digest_of
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.omni.finite import check_decision, finite_logits
from casa_mech.queries import Query, Reply, TextPart
from casa_mech.queries.files import QuerySource, read_files
from casa_mech.trace.contrast import Sampling, pick
from casa_mech.trace.fork import ReadPrompts, beside, read_prompts, resumed
from casa_mech.trace.generate import continue_from
from casa_mech.trace.steer import first_steps

MIN_PROTOTYPES = 10
"""Fewest unsafe text queries."""
MIN_SIDE = 10
"""Fewest harmful, and fewest benign, calibration queries."""
FULL_RISK = 0.99
"""The risk at similarity 1."""
Text = Literal["image_question", "image_opening", "audio_question", "audio_opening", "instruction"]
TEXTS: tuple[Text, ...] = get_args(Text)
"""The settings that are texts, for which the package has its own."""


class MorasSettings(DefenseSettings):
    """Options of MoRAS; constants as in the released code."""

    positions: int = Field(3, ge=1)
    """N, the response positions that are read and steered."""
    gamma: float = Field(0.3, gt=0, le=1)
    """Weight of each further position in the similarity."""
    context_tokens: int = Field(40, ge=1)
    """Most tokens of the sentence about the picture (or clip)."""
    prototypes: QuerySource | None = None
    """Unsafe text queries, whose mean states are the prototypes; None: `n_prototypes` of the micro-world's."""
    calibration: tuple[QuerySource, ...] = ()
    """Harmful and benign queries that fix S_base, a label for each source; empty: the micro-world's, with pictures."""
    n_prototypes: int = Field(50, ge=1)
    """How many prototypes to take from the micro-world."""
    n_calibration: int = Field(50, ge=1)
    """How many calibration queries of each side to take from the micro-world."""
    seed: int = 0
    """Of the micro-world's queries."""
    image_question: str | None = None
    """The question about a picture; None for the package's text, as in the next four."""
    image_opening: str | None = None
    """How the answer about a picture begins."""
    audio_question: str | None = None
    """The question about a clip."""
    audio_opening: str | None = None
    """How the answer about a clip begins."""
    instruction: str | None = None
    """The text before the request whose risk is measured."""
    extend: bool = True
    """Take text (no context) and audio (a transcript as context) too, which the paper does not define."""


@dataclass(frozen=True)
class FittedRisk:
    """The prototypes of one model, and the scale from similarity to risk."""

    prototypes: Tensor
    """Mean states of replies to unsafe text, after the final norm [position, d_model]."""
    base: float
    """S_base: mean similarity of the calibration queries; the risk is 1/2 there."""
    slope: float
    """k: how fast the risk rises with the similarity."""
    n_prototypes: int
    """Number of unsafe text queries."""
    n_harmful: int
    """Number of harmful calibration queries."""
    n_benign: int
    """Number of benign calibration queries."""


class Moras(Defense):
    """Modality-aware risk-adaptive steering.

    A query's risk is how near, in vocabulary space, the first states of the reply to it are to the mean first states of
    replies to unsafe text, when the prompt also says what the media hold, and to refuse what is unsafe. In the reply
    itself, to the query as it was given, these positions are moved towards the prototypes by the risk.

    Args:
        omni: the model.
        settings: options.
        prototypes: unsafe text queries, in the place of those that `settings` name.
        calibration: labelled queries, in the place of those that `settings` name.

    Raises:
        InputError: (on making one) sets of queries that are too small or one-sided, or none for this model.
    """

    name = "moras"

    def __init__(
        self,
        omni: Omni,
        settings: MorasSettings = MorasSettings(),
        prototypes: Sequence[Query] | None = None,
        calibration: Sequence[Query] | None = None,
    ) -> None:
        super().__init__(omni)
        self.settings = settings
        unsafe = _prototype_queries(omni, settings) if prototypes is None else list(prototypes)
        labelled = _calibration_queries(omni, settings) if calibration is None else list(calibration)
        check_sets(unsafe, labelled)
        self.fitted = self._fit(unsafe, labelled)

    def describe(self) -> Description:
        """States; a sentence about each medium and a probe of N tokens come before the reply."""
        return Description(
            name=self.name,
            changes=("states",),
            extra_forwards=self.settings.context_tokens + self.settings.positions,
            source="arXiv 2510.13698 and its released code",
            safety_prompt=self.safety_prompt,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """As of every defence, with its texts as worded for this model and what was fitted."""
        fitted = self.fitted
        texts = [self._text(name) for name in TEXTS]
        digest = digest_of([fitted.prototypes.float().cpu().numpy().tobytes()])
        return super().identity | {"texts": texts, "base": fitted.base, "prototypes": digest}

    def scores(self, queries: Sequence[Query], settings: GenerationSettings = GenerationSettings()) -> list[float]:
        """The risk of each query, in [0, 1].

        Raises:
            InputError: a query without a picture, `extend` being off. ModelError: a risk that is not finite.
        """
        queries = self._prepared(queries, settings)
        need_image(queries, self.name, self.settings.extend)
        risks: dict[int, float] = {}
        with torch.no_grad():
            for group in self.omni.batches(queries, settings.batch_size):
                members = [queries[index] for index in group]
                values = self._risks(read_prompts(self.omni, self.omni.encode(members)), members)
                risks |= zip(group, values.tolist(), strict=True)
        return [risks[index] for index in range(len(queries))]

    def _replies(self, queries: Sequence[Query], settings: GenerationSettings, progress: bool) -> list[Reply]:
        need_image(queries, self.name, self.settings.extend)

        def answer(group: list[int]) -> list[list[int]]:
            members = [queries[index] for index in group]
            read = read_prompts(self.omni, self.omni.encode(members))
            return self._steered(read, members, self._risks(read, members), settings)

        return self.omni.decoded(queries, settings, answer, self.name, progress)

    def _steered(
        self, read: ReadPrompts, queries: Sequence[Query], risks: Tensor, settings: GenerationSettings
    ) -> list[list[int]]:
        """Ids of each reply to the prompts read: the first N positions steered, the rest as the model has it."""
        sampling = Sampling.of(settings, len(risks), self.omni.device)
        steps = min(self.settings.positions, settings.max_new_tokens)
        prototypes = self.fitted.prototypes

        def choose(logits: Tensor) -> Tensor:
            check_decision("a logit of the reply", logits, queries)
            return pick(logits, sampling)

        first = first_steps(
            self.omni,
            resumed(self.omni, read),
            steps,
            pick=choose,
            edit=lambda position, states: steer(states, prototypes[position], risks),
        )
        replies: list[list[int]] = first.ids.tolist()
        unfinished = [row for row, ids in enumerate(replies) if self.omni.end_id not in ids]
        left = settings.max_new_tokens - steps
        if unfinished and left > 0:
            finite = finite_logits([queries[row] for row in unfinished])
            kwargs = settings.kwargs() | {"max_new_tokens": left, "logits_processor": finite}
            forced = [replies[row] for row in unfinished]
            more = continue_from(self.omni, read.batch, first.cache, forced, unfinished, kwargs)
            for row, ids in zip(unfinished, more.tolist(), strict=True):
                replies[row] += ids
        return replies

    def _risks(self, read: ReadPrompts, queries: Sequence[Query]) -> Tensor:
        fitted = self.fitted
        return risk(self._similarities(read, queries, fitted.prototypes), fitted.base, fitted.slope)

    def _similarities(self, read: ReadPrompts, queries: Sequence[Query], prototypes: Tensor) -> Tensor:
        """Similarity [query] to the prototypes of each query, under the instruction and with what its media hold."""
        instruction = self._text("instruction")
        probes = [
            with_text_before(query, f"{instruction} {context}".strip()).model_copy(update={"prefill": ""})
            for query, context in zip(queries, self._contexts(read, queries), strict=True)
        ]
        states = first_steps(self.omni, beside(self.omni, read, probes), self.settings.positions).states
        similarities = similarity(states, prototypes, self.omni.head, self.settings.gamma)
        check_decision("the similarity to MoRAS's prototypes", similarities, queries)
        return similarities

    def contexts(self, queries: Sequence[Query]) -> list[str]:
        """A sentence about each query's picture or clip (both, one after the other), without regard to what is asked;
        empty for text."""
        with torch.no_grad():
            return self._contexts(read_prompts(self.omni, self.omni.encode(queries)), queries)

    def _contexts(self, read: ReadPrompts, queries: Sequence[Query]) -> list[str]:
        contexts = [""] * len(queries)
        kinds: tuple[tuple[str, Text, Text], ...] = (
            ("image", "image_question", "image_opening"),
            ("audio", "audio_question", "audio_opening"),
        )
        for kind, question, opening in kinds:
            rows = [row for row, query in enumerate(queries) if kind in query.modalities]
            if not rows:
                continue
            prefill = self._text(opening)
            about = [_about_media(query, self._text(question), prefill) for query in queries]
            start = beside(self.omni, read, about, rows)
            ids = self.omni.model.generate(
                **start,
                max_new_tokens=self.settings.context_tokens,
                do_sample=False,
                logits_processor=finite_logits([queries[row] for row in rows]),
            )
            for row, new in zip(rows, ids[:, start["input_ids"].shape[1] :].tolist(), strict=True):
                sentence = f"{prefill} {self.omni.decode(self.omni.until_end(new))}".strip()
                contexts[row] = f"{contexts[row]} {sentence}".strip()
        return contexts

    def _text(self, name: Text) -> str:
        text = getattr(self.settings, name)
        return defense_text(self.omni, name) if text is None else text

    def _fit(self, unsafe: Sequence[Query], labelled: Sequence[Query], batch_size: int = 16) -> FittedRisk:
        n = self.settings.positions
        with torch.no_grad():
            groups = [[unsafe[i] for i in group] for group in self.omni.batches(unsafe, batch_size)]
            states = [first_steps(self.omni, self.omni.encode(group).inputs, n).states for group in groups]
            for members, group in zip(states, groups, strict=True):
                check_decision("a state that MoRAS makes a prototype of", members, group)
            mean = torch.cat(states).mean(dim=0)
            groups = [[labelled[i] for i in group] for group in self.omni.batches(labelled, batch_size)]
            read = ((read_prompts(self.omni, self.omni.encode(group)), group) for group in groups)
            base = float(torch.cat([self._similarities(*pair, mean) for pair in read]).mean())
        harmful = sum(query.label == "harmful" for query in labelled)
        return FittedRisk(mean, base, slope(base), len(unsafe), harmful, len(labelled) - harmful)


def slope(base: float) -> float:
    """k = ln(0.99 / 0.01) / (1 - S_base): the risk is 0.99 at similarity 1 (15.955 at S_base 0.712).

    Raises:
        InputError: all similarities are 1, so no risk can be told from another.
    """
    if 1 - base < 1e-6:
        raise InputError("the calibration queries are all exactly as similar to the prototypes as can be; use others")
    return math.log(FULL_RISK / (1 - FULL_RISK)) / (1 - base)


def similarity(states: Tensor, prototypes: Tensor, head: nn.Module, gamma: float) -> Tensor:
    """Cosine [batch] in vocabulary space of states [batch, position, d_model] and prototypes [position, d_model]: that
    of the sums over positions n of gamma^n times the head's softmax."""
    weights = gamma ** torch.arange(len(prototypes), device=states.device, dtype=torch.float32)
    reply = (head(states).float().softmax(dim=-1) * weights[:, None]).sum(dim=-2)
    unsafe = (head(prototypes.to(states.dtype)).float().softmax(dim=-1) * weights[:, None]).sum(dim=-2)
    return nn.functional.cosine_similarity(reply, unsafe[None], dim=-1)


def risk(similarities: Tensor, base: float, slope: float) -> Tensor:
    """sigmoid(k (s - S_base)) of similarities [batch]."""
    return torch.sigmoid(slope * (similarities - base))


def steer(states: Tensor, prototype: Tensor, risks: Tensor) -> Tensor:
    """(1 - r) h + r mu for states [batch, d_model], one position's prototype [d_model] and risks [batch]."""
    r = risks.to(states.dtype)[:, None]
    return (1 - r) * states + r * prototype.to(states.dtype)


def check_sets(prototypes: Sequence[Query], calibration: Sequence[Query]) -> None:
    """Refuse sets that MoRAS cannot be fitted on.

    Raises:
        InputError: too few prototypes or ones with media, unlabelled queries, or too few of a side; the message says
            how many are needed.
    """
    media = next((query for query in prototypes if query.modalities != {"text"}), None)
    if media is not None:
        raise InputError(f"query {media.id}: MoRAS takes its prototypes from text alone; leave out pictures and clips")
    if len(prototypes) < MIN_PROTOTYPES:
        raise InputError(
            f"{len(prototypes)} unsafe text queries are too few for MoRAS's prototypes: at least {MIN_PROTOTYPES} are "
            "needed (the paper has 50)"
        )
    unlabelled = next((query for query in calibration if query.label is None), None)
    if unlabelled is not None:
        raise InputError(
            f"query {unlabelled.id}: MoRAS's calibration set needs a label, harmful or benign, on every query"
        )
    harmful = sum(query.label == "harmful" for query in calibration)
    benign = len(calibration) - harmful
    if min(harmful, benign) < MIN_SIDE:
        raise InputError(
            f"MoRAS's calibration set has {harmful} harmful and {benign} benign queries: at least {MIN_SIDE} of each "
            "are needed (the paper has 50 of each)"
        )


def _about_media(query: Query, question: str, opening: str) -> Query:
    """`query` with `question` in the place of its own text, which is left out, and the answer begun."""
    parts = (*(part for part in query.parts if not isinstance(part, TextPart)), TextPart(text=question))
    return query.model_copy(update={"parts": parts, "prefill": opening})


def _prototype_queries(omni: Omni, settings: MorasSettings) -> list[Query]:
    if settings.prototypes is not None:
        return _read([settings.prototypes])
    _need_micro_world(omni, "prototypes")
    from casa_mech.organism.world import default_world

    return default_world().requests(settings.n_prototypes, settings.seed, "harmful", "seen", "seen")


def _calibration_queries(omni: Omni, settings: MorasSettings) -> list[Query]:
    if settings.calibration:
        return _read(settings.calibration)
    _need_micro_world(omni, "calibration")
    from casa_mech.attacks.registry import apply_attack
    from casa_mech.organism.world import default_world

    # Another seed than the prototypes', so that the two sets are drawn apart.
    plain = default_world().requests(2 * settings.n_calibration, settings.seed + 1, None, "seen", "seen")
    return apply_attack("image", plain, settings.seed)


def _read(sources: Sequence[QuerySource]) -> list[Query]:
    return [query for source in sources for query in read_files(source)]


def _need_micro_world(omni: Omni, option: str) -> None:
    if not omni.speaks_micro_world:
        raise InputError(f"defense 'moras' needs queries to be fitted on: set {option} to your own (see MorasSettings)")
