"""The refusal direction: a difference in means, chosen by what removing and adding it does (docs/method.md §5.4).

After `andyrdt/refusal_direction` (arXiv 2406.11717). The result of a fit is a frozen value that applies itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import LongTensor, Tensor

from casa_mech.divergence import kl_divergence
from casa_mech.errors import InputError, RunError
from casa_mech.files import writing
from casa_mech.omni import Omni
from casa_mech.omni.batch import OmniBatch
from casa_mech.queries import Query
from casa_mech.trace.capture import Cut, capture_cuts
from casa_mech.trace.patch import edited_prompt
from casa_mech.trace.sites import Edit, Site
from casa_mech.trace.standing import standing_edits

MAX_KL = 0.1
"""KL in nats, on harmless prompts without the direction, that a candidate may have at most."""
MIN_ADDED = 0.0
"""Refusal score, on harmless prompts with the direction added, that a candidate must have at least."""
DEPTH = 0.8
"""Share of the depth beyond which no candidate is taken."""


@dataclass(frozen=True)
class RefusalDirection:
    """A direction in the residual stream that can be projected on, removed and added."""

    difference: np.ndarray
    """float64 [d_model]: mean of the harmful minus mean of the harmless prompts' states."""
    layer: int
    """The block before which it was read."""
    at: int
    """The position, counted back from the header's last token (0)."""
    rules_met: bool = True
    """Whether it met all the rules of its selection."""

    @property
    def unit(self) -> np.ndarray:
        """The direction with length 1, float64 [d_model]."""
        return self.difference / np.linalg.norm(self.difference)

    def project(self, states: np.ndarray) -> np.ndarray:
        """Coordinate along the direction [...] of `states` [..., d_model]: a detector of one number."""
        return np.asarray(states @ self.unit)

    def ablate(self, states: Tensor) -> Tensor:
        """`states` [..., d_model] without their component along the direction."""
        unit = torch.as_tensor(self.unit, dtype=states.dtype, device=states.device)
        return states - (states @ unit).unsqueeze(-1) * unit

    def add(self, states: Tensor, coefficient: float = 1.0) -> Tensor:
        """`states` [..., d_model] plus `coefficient` times the difference of the means."""
        return states + coefficient * torch.as_tensor(self.difference, dtype=states.dtype, device=states.device)

    def ablation(self, n_layers: int) -> dict[Site, Edit]:
        """The edits that keep the direction out of the residual stream: block inputs, attention and MLP outputs."""
        return {f"{part}.{layer}": self.ablate for layer in range(n_layers) for part in ("pre", "attention", "mlp")}

    def addition(self, coefficient: float = 1.0) -> dict[Site, Edit]:
        """The edit that adds the difference before its block, at every position."""
        return {f"pre.{self.layer}": lambda states: self.add(states, coefficient)}

    @contextmanager
    def ablated(self, omni: Omni) -> Iterator[None]:
        """Keep the direction out of the model while a block runs: generation, gate and traces in it see it so."""
        with standing_edits(omni, self.ablation(omni.n_layers)):
            yield

    @contextmanager
    def added(self, omni: Omni, coefficient: float = 1.0) -> Iterator[None]:
        """Add the direction in the model while a block runs."""
        with standing_edits(omni, self.addition(coefficient)):
            yield

    def save(self, path: Path | str, about: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file whose header holds the rest as JSON.

        `about` is stored beside it, such as the model's fingerprint; `load` compares that one.
        """
        record = {"layer": self.layer, "at": self.at, "rules_met": self.rules_met, "about": dict(about or {})}
        with writing(path) as temporary:
            save_file({"difference": self.difference}, temporary, metadata={"direction": json.dumps(record)})

    @classmethod
    def load(cls, path: Path | str, fingerprint: str = "") -> RefusalDirection:
        """The direction that `save` wrote; with `fingerprint`, only if `about["fingerprint"]` was that.

        Raises:
            RunError: missing, cut short, no direction, or another model's.
        """
        try:
            with safe_open(path, framework="numpy") as stored:
                record = json.loads((stored.metadata() or {})["direction"])
                difference = stored.get_tensor("difference")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunError(f"{path} is not a readable direction ({error}); find and save it again") from None
        if fingerprint and record["about"].get("fingerprint") != fingerprint:
            raise RunError(f"{path} was found in another model, not in {fingerprint[:8]}")
        return cls(difference, record["layer"], record["at"], record["rules_met"])


@dataclass(frozen=True)
class Selection:
    """The chosen direction, and all candidates."""

    direction: RefusalDirection
    candidates: pd.DataFrame
    """One row each: `layer, at, length` (of the difference), `ablated` (mean refusal score on harmful prompts without
    it), `added` (on harmless prompts with it), `kl` (mean on harmless prompts without it, nats), `allowed`."""
    base_harmful: float
    """Mean refusal score of the untouched model on the harmful validation prompts."""
    base_harmless: float
    """The same on the harmless ones."""
    n_train: int
    """Prompts of a class that the direction was fitted on, after filtering; the smaller class."""
    n_val: int
    """Prompts of a class that chose among the candidates; the smaller class."""


def opening_ids(omni: Omni, refusals: Sequence[str]) -> LongTensor:
    """Ids of the first tokens of `refusals`, the tokens whose probability the refusal score adds up.

    Raises:
        InputError: none, or one that is empty.
    """
    rows = [omni.tokenizer(text, add_special_tokens=False)["input_ids"] for text in refusals]
    if not rows or not all(rows):
        raise InputError("a refusal score needs the refusals' openings: give at least one text, none of them empty")
    return torch.tensor(sorted({row[0] for row in rows}))


def refusal_score(logits: Tensor, openings: LongTensor) -> Tensor:
    """log p - log(1 - p) [batch] of `logits` [batch, vocab], p the probability of a refusal's opening token."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    refusing = torch.zeros(logs.shape[-1], dtype=torch.bool, device=logs.device)
    refusing[openings] = True
    return torch.logsumexp(logs[:, refusing], dim=-1) - torch.logsumexp(logs[:, ~refusing], dim=-1)


def find_refusal_direction(
    omni: Omni,
    harmful: Sequence[Query],
    harmless: Sequence[Query],
    refusals: Sequence[str],
    *,
    n_train: int = 128,
    n_val: int = 32,
    seed: int = 42,
    batch_size: int = 32,
    relax: bool = False,
) -> Selection:
    """The direction whose removal takes most refusals away, among those the rules allow.

    Candidates are the differences of the class means at every template position after the request and before every
    block (float64). Prompts that the model does not refuse (harmful) or refuses (harmless) are left out first.

    Args:
        omni: the model; whatever is attached to it takes part.
        harmful, harmless: queries, at least `n_train + n_val` of each if that many are wanted.
        refusals: texts that refuse, as the model words them; their first tokens are what the score counts.
        n_train, n_val, seed: how many of each class, drawn with this seed.
        batch_size: queries in one forward.
        relax: take the best candidate when none meets all rules, marked `rules_met=False`.

    Raises:
        InputError: too few prompts of a class left by the filter, or no candidate that the rules allow.
    """
    openings = opening_ids(omni, refusals)
    rng = np.random.default_rng(seed)
    (train_h, val_h), (train_b, val_b) = [
        _filtered(omni, queries, openings, sign, n_train, n_val, rng, batch_size)
        for queries, sign in ((harmful, 1), (harmless, -1))
    ]
    reach = min(_template_length(omni, train_h[:8]), _template_length(omni, train_b[:8]))
    difference = _means(omni, train_h, reach, batch_size) - _means(omni, train_b, reach, batch_size)
    base = _logits(omni, val_b, {}, batch_size)
    table = _candidates(omni, difference, val_h, val_b, base, openings, batch_size)
    best = choose_candidate(table, relax)
    direction = RefusalDirection(
        difference[best["layer"], best["at"]].numpy(), int(best["layer"]), int(best["at"]), bool(best["allowed"])
    )
    before = refusal_score(_logits(omni, val_h, {}, batch_size), openings)
    return Selection(
        direction, table, float(before.mean()), float(refusal_score(base, openings).mean()),
        min(len(train_h), len(train_b)), min(len(val_h), len(val_b)),
    )  # fmt: skip


def choose_candidate(candidates: pd.DataFrame, relax: bool = False) -> pd.Series:
    """The row of `Selection.candidates` that is allowed and has the lowest refusal score when ablated.

    Raises:
        InputError: none is allowed, and `relax` is off.
    """
    allowed = candidates[candidates["allowed"]]
    if not len(allowed) and not relax:
        gentle, strong = (candidates["kl"] <= MAX_KL).sum(), (candidates["added"] >= MIN_ADDED).sum()
        raise InputError(
            f"none of {len(candidates)} candidates meets the rules: {gentle} have a KL of at most {MAX_KL}, {strong} "
            "make harmless prompts refused; relax=True takes the best all the same"
        )
    pool = allowed if len(allowed) else candidates
    return candidates.loc[pool["ablated"].idxmin()]


def _filtered(
    omni: Omni,
    queries: Sequence[Query],
    openings: LongTensor,
    sign: int,
    n_train: int,
    n_val: int,
    rng: np.random.Generator,
    batch_size: int,
) -> tuple[list[Query], list[Query]]:
    """Train and validation prompts of one class whose refusal score has the right sign."""
    drawn = [queries[place] for place in rng.permutation(len(queries))[: n_train + n_val]]
    scores = refusal_score(_logits(omni, drawn, {}, batch_size), openings) if drawn else torch.zeros(0)
    share = n_train / (n_train + n_val)
    cut = min(n_train, round(share * len(drawn)))
    right = [bool(sign * score > 0) for score in scores]
    train = [query for query, keep in zip(drawn[:cut], right[:cut], strict=True) if keep]
    val = [query for query, keep in zip(drawn[cut:], right[cut:], strict=True) if keep]
    if len(train) < 2 or not val:
        name, does = ("harmful", "refuses") if sign > 0 else ("harmless", "does not refuse")
        raise InputError(
            f"of {len(drawn)} {name} prompts the model {does} only {len(train)} for the fit and {len(val)} to judge "
            "it: give more prompts, or refusals worded as this model words them"
        )
    return train, val


def _candidates(
    omni: Omni,
    difference: Tensor,
    harmful: Sequence[Query],
    harmless: Sequence[Query],
    base: Tensor,
    openings: LongTensor,
    batch_size: int,
) -> pd.DataFrame:
    """`Selection.candidates` of all differences [layer, at, d_model]; base: plain logits on the harmless prompts."""
    rows = []
    for layer in range(difference.shape[0]):
        for at in range(difference.shape[1]):
            candidate = RefusalDirection(difference[layer, at].numpy(), layer, at)
            if not candidate.difference.any():
                continue  # before block 0 a template token is the same in every prompt
            rows.append(_candidate_row(omni, candidate, harmful, harmless, base, openings, batch_size))
    table = pd.DataFrame(rows)
    table["allowed"] = (
        (table["kl"] <= MAX_KL) & (table["added"] >= MIN_ADDED) & (table["layer"] < DEPTH * omni.n_layers)
    )
    return table


def _candidate_row(
    omni: Omni,
    candidate: RefusalDirection,
    harmful: Sequence[Query],
    harmless: Sequence[Query],
    base: Tensor,
    openings: LongTensor,
    batch_size: int,
) -> dict[str, float]:
    """The columns of `Selection.candidates` but `allowed`."""
    without = candidate.ablation(omni.n_layers)
    spared = _logits(omni, harmless, without, batch_size)
    before, after = torch.log_softmax(base.double(), dim=-1), torch.log_softmax(spared.double(), dim=-1)
    added = _logits(omni, harmless, candidate.addition(), batch_size)
    return {
        "layer": candidate.layer,
        "at": candidate.at,
        "length": float(np.linalg.norm(candidate.difference)),
        "ablated": float(refusal_score(_logits(omni, harmful, without, batch_size), openings).mean()),
        "added": float(refusal_score(added, openings).mean()),
        "kl": float(kl_divergence(before, after).mean()),
    }


def _logits(omni: Omni, queries: Sequence[Query], edits: Mapping[Site, Edit], batch_size: int) -> Tensor:
    """Logits [query, vocab] at the gate's position, in the queries' order."""
    logits: list[Tensor] = []
    order: list[int] = []
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[place] for place in group], prefill=False)
        logits.append(edited_prompt(omni, batch, batch.gate_position, edits).logits.cpu())
        order += group
    return torch.cat(logits)[torch.argsort(torch.tensor(order))]


def _template_length(omni: Omni, queries: Sequence[Query]) -> int:
    """Number of template tokens that every prompt has after the request, header included."""
    batch = omni.encode(list(queries), prefill=False)
    content = batch.modality["text"] | batch.modality["image"] | batch.modality["audio"]
    place = torch.arange(content.shape[1], device=content.device)
    return int((batch.gate_position - (content * place).amax(dim=1)).min())


def _means(omni: Omni, queries: Sequence[Query], reach: int, batch_size: int) -> Tensor:
    """Mean states before each block at each template position, float64 [layer, at, d_model]."""
    total = torch.zeros(omni.n_layers, reach, omni.d_model, dtype=torch.float64)
    for group in omni.batches(queries, batch_size):
        batch = omni.encode([queries[place] for place in group], prefill=False)
        states = capture_cuts(
            omni, batch, [f"pre.{layer}" for layer in range(omni.n_layers)], [_template(batch, reach)]
        )
        for layer, (at_template,) in enumerate(states.values()):
            total[layer] += at_template.double().cpu().unflatten(0, (len(group), reach)).sum(dim=0)
    return total / len(queries)


def _template(batch: OmniBatch, reach: int) -> Cut:
    """The last `reach` template positions of every prompt, counted back from the header's last token."""
    row = torch.arange(batch.size, device=batch.gate_position.device).repeat_interleave(reach)
    at = torch.arange(reach, device=row.device).repeat(batch.size)
    return Cut("template", row, batch.gate_position[row] - at, at)
