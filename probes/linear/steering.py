"""Adding a direction to a model's states while it works, and what each dose of it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from casa_mech.divergence import kl_from_logits
from casa_mech.errors import InputError
from casa_mech.judging import Judge, KeywordJudge, judge_all
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import cluster_of, rate_interval
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Prompt, Query, as_queries
from casa_mech.trace.sites import Edit, Site, all_sites
from casa_mech.trace.standing import standing_edits
from probes.linear.refusal_direction import RefusalDirection

STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)
KL, REFUSED, ANSWERED = "kl", "refused", "answered"


class PlacedDirection(Protocol):
    """A direction that knows its site, such as a `PromptProbe`: the difference of its class means."""

    @property
    def difference(self) -> np.ndarray:
        """[d_model]."""

    @property
    def site(self) -> Site:
        """Where it was read."""


Direction: TypeAlias = RefusalDirection | PlacedDirection | np.ndarray | Tensor | Sequence[float]


@contextmanager
def steer(
    model: Omni, direction: Direction, strength: float = 1.0, where: Site | Sequence[Site] | None = None
) -> Iterator[None]:
    """Add `strength` times `direction` at every position while a block runs: generation, gates and traces see it.

    Example:
        ```python
        with probes.steer(model, probe, strength=-1.0):
            print(model.generate(["how do i make a cake ?"])[0].text)
        ```

    Args:
        model: the model; LoRA must not be put in or taken out within the block.
        direction: [d_model]; a `RefusalDirection` or a `PromptProbe` stand for their difference of means, harmful minus
            benign, so that strength 1 is the way from one class's mean to the other's.
        strength: how much of it; 0 changes nothing, below 0 it is taken away.
        where: site or sites that get it (`casa_mech.trace.sites.Site`); None: where the direction was read.

    Raises:
        InputError: a direction of another width or not finite, no site, or one that the model does not have.
    """
    with standing_edits(model, _edits(model, direction, strength, where)):
        yield


def dose_response(
    model: Omni,
    direction: Direction,
    strengths: Sequence[float] = STRENGTHS,
    *,
    harmful: Sequence[Prompt] = (),
    benign: Sequence[Prompt] = (),
    where: Site | Sequence[Site] | None = None,
    judge: Judge | None = None,
    settings: GenerationSettings = GenerationSettings(),
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """What steering does to refusals, answers and the distribution of replies, by strength; 0 is always among them.

    Args:
        model, direction, where: as for `steer`.
        strengths: the doses.
        harmful, benign: prompts, of at least one class.
        judge: of the replies; default the keyword judge, for which every reply in words that does not refuse is an
            answer, babble too: read it beside the divergence.
        settings: of generation; the unsteered replies behind the divergence are greedy.
        seed: of the intervals.
        progress: whether to draw bars; None: where a person watches.

    Returns:
        Columns `strength, label, measure, value, low, high, n`, with intervals over topics. Measures: "kl", the mean
        over an unsteered reply's tokens of KL(unsteered ‖ steered) in nats; "refused" and "answered", shares of the
        replies that the judge could decide on.

    Raises:
        InputError: as `steer`, no prompts, a strength that is not finite, or a prompt with a prefill.
    """
    doses = sorted({0.0, *(float(strength) for strength in strengths)})
    if not np.isfinite(doses).all():
        raise InputError(f"strengths {list(strengths)}: give finite numbers")
    queries = [*as_queries(harmful, "harmful", "harmful"), *as_queries(benign, "benign", "benign")]
    model.warn_of_unknown_words([query.text for query in queries if query.text])
    if not queries:
        raise InputError("a dose-response needs prompts: give harmful=[...], benign=[...] or both")
    prefilled = next((query.id for query in queries if query.prefill), None)
    if prefilled is not None:
        raise InputError(f"query {prefilled!r} has a prefill: the divergence is measured on plain prompts")
    edits = {dose: _edits(model, direction, dose, where) for dose in doses}
    divergences = _divergences(model, queries, edits, settings)
    rows = []
    for dose in doses:
        with standing_edits(model, edits[dose]):
            replies = model.generate(queries, settings, progress)
        verdicts = judge_all(judge or KeywordJudge(), queries, replies)
        for label in dict.fromkeys(query.label for query in queries):
            places = [place for place, query in enumerate(queries) if query.label == label]
            where_from = {"strength": dose, "label": label}
            clusters = [cluster_of(queries[place]) for place in places]
            moved = mean_interval([divergences[dose][place] for place in places], clusters, seed)
            rows.append({**where_from, "measure": KL, **moved._asdict(), "n": len(places)})
            decided = [place for place in places if verdicts[place].decided]
            for measure, hits in (
                (REFUSED, [verdicts[place].refused for place in decided]),
                (ANSWERED, [verdicts[place].complied for place in decided]),
            ):
                estimate = Estimate(np.nan, np.nan, np.nan)
                if decided:
                    estimate = rate_interval(hits, [cluster_of(queries[place]) for place in decided], seed).widened()
                rows.append({**where_from, "measure": measure, **estimate._asdict(), "n": len(decided)})
    return pd.DataFrame(rows)


def _edits(
    model: Omni, direction: Direction, strength: float, where: Site | Sequence[Site] | None
) -> Mapping[Site, Edit]:
    vector, own = _vector(direction)
    if vector.shape != (model.d_model,) or not np.isfinite(vector).all():
        raise InputError(
            f"a direction of shape {list(vector.shape)}: {model.source} takes [{model.d_model}], all finite"
        )
    wanted = own if where is None else [where] if isinstance(where, str | int) else list(where)
    if not wanted:
        raise InputError("a direction by itself has no place: give where=, such as where=10 or where=['pre.3', 'norm']")
    added = torch.from_numpy(strength * vector)
    by_name = {str(site): site for site in all_sites(model.n_layers)}

    def add(states: Tensor) -> Tensor:
        return states + added.to(states)

    return dict.fromkeys((by_name.get(str(site), site) for site in wanted), add)


def _vector(direction: Any) -> tuple[np.ndarray, list[Site]]:
    """The vector, float64, and the sites that come with it."""
    if isinstance(direction, RefusalDirection):
        return direction.difference, [f"pre.{direction.layer}"]
    if hasattr(direction, "difference") and hasattr(direction, "site"):
        return np.asarray(direction.difference, dtype=np.float64), [direction.site]
    if isinstance(direction, Tensor):
        direction = direction.detach().float().cpu()
    try:
        return np.asarray(direction, dtype=np.float64), []
    except (TypeError, ValueError):
        raise InputError(
            f"a direction is a vector, a RefusalDirection or a PromptProbe, not a {type(direction).__name__}"
        ) from None


@torch.no_grad()
def _divergences(
    model: Omni, queries: Sequence[Query], edits: Mapping[float, Mapping[Site, Edit]], settings: GenerationSettings
) -> dict[float, list[float]]:
    """For each dose the mean KL of each query, over the tokens of its unsteered greedy reply and its end."""
    greedy = settings.model_copy(update={"do_sample": False})
    replies = model.generate(queries, greedy, False)
    values = {dose: [0.0] * len(queries) for dose in edits}
    for places in model.batches(queries, settings.batch_size):
        batch = model.encode([queries[place] for place in places], [model.reply_ids(replies[p].text) for p in places])
        assert batch.labels is not None
        predicted = batch.labels[:, 1:] != -100
        # No trace: it would not see an edit at the very module that it reads, which the final norm can be.
        base = model.model(**batch.inputs, use_cache=False).logits[:, :-1][predicted]
        for dose, edit in edits.items():
            with standing_edits(model, edit):
                steered = model.model(**batch.inputs, use_cache=False).logits[:, :-1][predicted]
            by_row = kl_from_logits(base, steered).split(predicted.sum(dim=1).tolist())
            for place, divergence in zip(places, by_row, strict=True):
                values[dose][place] = float(divergence.mean())
    return values
