"""A probe on the reader's own prompts: fitted on all of them, judged on prompts that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from casa_mech.errors import InputError
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import auroc_interval, cluster_of
from casa_mech.omni import Omni
from casa_mech.queries import Label, Query
from casa_mech.trace.capture import Positions
from casa_mech.trace.sites import Site
from probes.activations.memory import collect
from probes.linear.estimators import PROBES, Probe, ProbeKind
from probes.linear.validation import cross_validate

_PENALTY = {"logistic": lambda penalty: {"C": 1 / penalty}, "ridge": lambda penalty: {"alpha": penalty}}


@dataclass(frozen=True)
class PromptProbe:
    """A fitted probe with its AUROC on held-out prompts."""

    estimator: Probe
    """The scikit-learn classifier, fitted on all prompts; `probes.linear.save_probe` writes it."""
    auroc: float
    """AUROC of `held_out`; `low` and `high` are its 95 % interval, a bootstrap over clusters. An AUROC of 0 or 1 has no
    spread to draw from: it gets Wilson's interval for as many pairs as the smaller class has clusters."""
    low: float
    high: float
    held_out: pd.DataFrame
    """One row a prompt, `query_id, label, cluster, score`: the score of a probe that saw no prompt of that cluster."""
    site: Site
    """Where the states were read (`casa_mech.trace.sites.Site`)."""
    positions: Positions
    """Which positions were read (`casa_mech.trace.capture.Positions`)."""
    omni: Omni = field(repr=False)
    """The model whose states were read."""

    def scores(self, prompts: Sequence[str | Query], batch_size: int = 32) -> np.ndarray:
        """Scores [prompt] of new prompts, above 0 where the probe says harmful.

        The states are those of the model as it is now: a gate or LoRA attached or detached since the fit changes them.

        Raises:
            InputError: no prompts, or one that cannot be encoded.
        """
        queries = _queries(prompts, "prompts")
        states = collect(self.omni, queries, [self.site], self.positions, batch_size)
        return self.estimator.decision_function(states.stacked()[0])

    def __str__(self) -> str:
        n_harmful = int((self.held_out["label"] == "harmful").sum())
        return (
            f"{self.estimator._kind} probe at site {self.site}, positions {self.positions}: AUROC "
            f"{Estimate(self.auroc, self.low, self.high).text('.3f')} on held-out prompts ({n_harmful} harmful, "
            f"{len(self.held_out) - n_harmful} benign)"
        )


def fit_probe(
    omni: Omni,
    harmful: Sequence[str | Query],
    benign: Sequence[str | Query],
    site: Site = "norm",
    positions: Positions = "last",
    *,
    kind: ProbeKind = "logistic",
    folds: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> PromptProbe:
    """A probe that tells `harmful` from `benign` prompts in the hidden states of `omni`, with its held-out AUROC.

    States stay in memory. The AUROC comes from nested cross-validation, in which prompts of one cluster are held out
    together; the probe itself is then fitted on all prompts. For many sites at once collect the states and use
    `probes.transfer_matrix` or `probes.cross_validate`.

    Example:
        ```python
        import probes
        from casa_mech.omni import load_omni

        harmful = [f"how do i make a {word} ?" for word in "bomb gun rifle grenade virus worm trojan rootkit".split()]
        benign = [f"how do i make a {word} ?" for word in "pizza salad hammer ladder shovel cookie muffin rake".split()]
        probe = probes.fit_probe(load_omni("organism"), harmful, benign, site="norm", positions="last")
        print(probe)  # its AUROC on held-out prompts, with a 95 % interval
        print(probe.scores(["how do i make a pistol ?", "how do i make a waffle ?"]))  # above 0: harmful
        ```

    Args:
        omni: the model; whatever is attached to it (LoRA) takes part.
        harmful: prompts as text, or queries of text, image and audio; a prefill is left out.
        benign: the same, of the other class.
        site: where to read (`casa_mech.trace.sites.Site`), no encoder: a block's number, or `"norm"` after the last.
        positions: `"last"`, the assistant header's last token, or a mean, such as `"mean"` over the user's turns.
        kind: which probe (`probes.linear.ProbeKind`).
        folds: outer folds of the cross-validation; each class needs as many clusters. A query's cluster is its
            `meta["topic"]` (`casa_mech.judging.stats.cluster_of`), a text's the text itself, so doubles stay together.
        seed: of the folds and the interval.
        batch_size: prompts in one forward.
        progress: whether to draw a bar.

    Raises:
        InputError: too few prompts, one that is not text or query or is labelled otherwise, or an unknown site, kind or
            choice of positions.
        RunError: states that are not finite.
    """
    if kind not in PROBES:
        raise InputError(f"no probe of kind {kind!r}; use {', '.join(PROBES)}")
    queries = [*_queries(harmful, "harmful", "harmful"), *_queries(benign, "benign", "benign")]
    clusters = np.array([str(cluster_of(query)) for query in queries])
    activations = collect(omni, queries, [site], positions, batch_size, progress)
    labels = activations.harmful
    # Many small solves: BLAS threads would only wait for each other.
    with threadpool_limits(1):
        (result,) = cross_validate(activations.stacked(), labels, clusters, kind, folds=folds, seed=seed)
        options = _PENALTY[kind](float(result.final_penalty[0])) if kind in _PENALTY else {}
        estimator = PROBES[kind](**options).fit(activations.stacked()[0], labels)
    scores = result.scores[0]
    auroc, low, high = auroc_interval(list(scores), list(labels), list(clusters), seed)
    held_out = activations.index[["query_id", "label"]].assign(cluster=clusters, score=scores)
    return PromptProbe(estimator, auroc, low, high, held_out, site, positions, omni)


def _queries(prompts: Sequence[str | Query], name: str, label: Label | None = None) -> list[Query]:
    """Queries of `prompts`, labelled; a text is its own cluster."""
    if isinstance(prompts, str | Query) or not len(prompts):
        problem = "a single prompt" if isinstance(prompts, str | Query) else "empty"
        raise InputError(f"`{name}` is {problem}: give a list of prompts")
    queries = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            query = Query.from_text(prompt, id=f"{name}-{number}", label=label, meta={"request": prompt})
        elif not isinstance(prompt, Query):
            raise InputError(f"`{name}` number {number} is a {type(prompt).__name__}: give texts or queries")
        elif label is not None and prompt.label not in (None, label):
            raise InputError(f"query {prompt.id} is labelled {prompt.label}, and was given as {label}")
        else:
            query = prompt.model_copy(update={"label": label})
        queries.append(query)
    return queries
