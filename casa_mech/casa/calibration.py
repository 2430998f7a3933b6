"""What a gate learns from calibration prompts: the means and spreads of surfaces, and the log-odds of benign prompts.

Re-centring and rescaling are unsupervised alignments of a surface with text (docs/method.md §1.10). Two states of a
prompt are read by the gate, and both are moved: the states that safety attention attends to (layer `CasaConfig.layer`,
every position by the same vector) and the final state at the gate's position, from which the head makes the pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import LongTensor, Tensor

from casa_mech.casa.config import InferenceSettings
from casa_mech.casa.gate import SafetyGate
from casa_mech.errors import InputError
from casa_mech.identity import digest_of
from casa_mech.omni import Omni, OmniBatch
from casa_mech.omni.finite import check_decision
from casa_mech.queries import Query, Reply
from casa_mech.trace.capture import Cut, capture_cuts, make_cut
from casa_mech.trace.gate import ReadEdits

SURFACES = ("text", "image", "audio", "image+audio")
"""The kinds of media in the user's turns; text may go with any of them."""
ATTENDED, DECIDED = 0, 1
"""Index of the two states of a prompt: the mean of those safety attention reads, and that at the gate's position."""


@dataclass(frozen=True)
class Calibration:
    """Numbers fitted on calibration prompts; those of `means`, `spreads` and `odds` are by surface."""

    means: Mapping[str, Tensor] = field(default_factory=dict)
    """[2, d_model]: mean over unlabelled prompts of each of the two states."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Number of unlabelled prompts."""
    directions: Tensor | None = None
    """[2, d_model]: unit difference of means, harmful minus benign, of labelled text; None: none was given."""
    spreads: Mapping[str, Tensor] = field(default_factory=dict)
    """[2]: standard deviation of the unlabelled prompts' states along `directions`."""
    odds: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """By reading (`InferenceSettings.reading`), then surface, [n]: log-odds of benign prompts."""

    def lacks(self, settings: InferenceSettings) -> str:
        """What the options need that these numbers do not hold, with the way out; empty where nothing is missing."""
        if settings.recentre and "text" not in self.means:
            return "recentre needs a calibration: run casa-mech calibrate (Casa.calibrate) on unlabelled text and media"
        if settings.rescale and self.directions is None:
            return "rescale needs a direction: run casa-mech calibrate (Casa.calibrate) with labelled text, too"
        if settings.fpr and "text" not in self.odds.get(settings.reading, {}):
            return "fpr needs a calibration: run casa-mech calibrate (Casa.calibrate) with benign text prompts"
        return ""

    def edits(self, batch: OmniBatch, settings: InferenceSettings) -> ReadEdits | None:
        """What the gate reads of `batch` under `settings`; None for the states as they are.

        Raises:
            InputError: a prompt of a surface that was not calibrated.
        """
        if not settings.recentre:
            return None
        names = [SURFACES[index] for index in surfaces_of(batch).tolist()]
        missing = next((name for name in names if name not in self.means), None)
        if missing is not None:
            raise InputError(
                f"a prompt with {missing} cannot be re-centred: the calibration has none; calibrate with such queries, "
                "or switch recentre off"
            )
        text, device = self.means["text"], batch.gate_position.device
        shifts = torch.stack([text - self.means[name] for name in names]).to(device)
        if not settings.rescale:
            return ReadEdits(
                lambda states: _shifted(states, shifts[:, ATTENDED]),
                lambda states: _shifted(states, shifts[:, DECIDED]),
            )
        assert self.directions is not None
        stretches = torch.stack([self.spreads["text"] / self.spreads[name] - 1 for name in names]).to(device)
        text, directions = text.to(device), self.directions.to(device)

        def moved(states: Tensor, read: int) -> Tensor:
            shifted = _shifted(states, shifts[:, read])
            return _stretched(shifted, stretches[:, read], text[read], directions[read])

        return ReadEdits(lambda states: moved(states, ATTENDED), lambda states: moved(states, DECIDED))

    def limits(self, batch: OmniBatch, settings: InferenceSettings) -> Tensor | None:
        """Log-odds [batch] above which a prompt is flagged, at `settings.fpr`; None without one."""
        if not settings.fpr:
            return None
        odds = self.odds[settings.reading]
        names = [SURFACES[index] if settings.fpr_by_surface else "text" for index in surfaces_of(batch).tolist()]
        quantiles = {name: odds.get(name, odds["text"]).quantile(1 - settings.fpr) for name in set(names)}
        return torch.stack([quantiles[name] for name in names]).to(batch.gate_position.device)

    def with_odds(self, settings: InferenceSettings, queries: Sequence[Query], replies: Sequence[Reply]) -> Calibration:
        """The same with the log-odds of `queries`, benign ones, that were decided on under `settings`."""
        values: dict[str, list[float]] = {}
        for query, reply in zip(queries, replies, strict=True):
            assert reply.logit_unsafe is not None and reply.logit_safe is not None
            values.setdefault(_surface(query), []).append(reply.logit_unsafe - reply.logit_safe)
        odds = {name: torch.tensor(of) for name, of in values.items()}
        return replace(self, odds={**self.odds, settings.reading: odds})

    def sizes(self) -> dict[str, dict[str, int]]:
        """Number of prompts by purpose and surface, for the gate's record."""
        benign = next(iter(self.odds.values()), {})
        return {"unlabelled": dict(self.counts), "benign": {name: len(values) for name, values in benign.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by name, for a file."""
        flat = {f"mean/{name}": mean for name, mean in self.means.items()}
        flat |= {f"count/{name}": torch.tensor(count) for name, count in self.counts.items()}
        flat |= {f"spread/{name}": spread for name, spread in self.spreads.items()}
        flat |= {f"odds/{reading}/{name}": odds for reading, of in self.odds.items() for name, odds in of.items()}
        return flat if self.directions is None else {**flat, "directions": self.directions}

    @property
    def digest(self) -> str:
        """Of all numbers; empty where there are none."""
        tensors = sorted(self.tensors().items())
        return (
            digest_of(piece for name, value in tensors for piece in (name, value.numpy().tobytes())) if tensors else ""
        )

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """What `tensors` gave."""

        # A copy lies in memory as it did when it was fitted, which is what makes decisions the same to the bit.
        tensors = {name: value.clone() for name, value in tensors.items()}

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        odds: dict[str, dict[str, Tensor]] = {}
        for name, values in under("odds/").items():
            reading, _, surface = name.partition("/")
            odds.setdefault(reading, {})[surface] = values
        counts = {name: int(count) for name, count in under("count/").items()}
        return cls(under("mean/"), counts, tensors.get("directions"), under("spread/"), odds)


def surfaces_of(batch: OmniBatch) -> LongTensor:
    """Index in `SURFACES` [batch] of each prompt."""
    return batch.modality["image"].any(dim=1).long() + 2 * batch.modality["audio"].any(dim=1).long()


def prompts_by_use(queries: Sequence[Query]) -> tuple[list[Query], list[Query]]:
    """`benign` and `labelled` for `Casa.calibrate` from one list of `queries`: the benign ones for the threshold, and
    the labelled text for the direction, where both labels are among it."""
    labelled = [query for query in queries if query.label is not None and _surface(query) == "text"]
    both = {query.label for query in labelled} == {"harmful", "benign"}
    benign = [query for query in queries if query.label == "benign"]
    return benign, labelled if both else []


def _surface(query: Query) -> str:
    """The surface of a query, of `SURFACES`, read as `surfaces_of` reads it off a batch: from all turns of the user."""
    kinds = {part.kind for turn in query.history if turn.role == "user" for part in turn.parts} | query.modalities
    return "+".join(kind for kind in ("image", "audio") if kind in kinds) or "text"


def check_calibration(queries: Sequence[Query], benign: Sequence[Query], labelled: Sequence[Query]) -> None:
    """Refuse prompts that a gate cannot be calibrated on. The labels of `queries` are not looked at.

    Raises:
        InputError: naming what is missing, or the query that does not belong.
    """
    if not queries and not benign:
        raise InputError("nothing to calibrate on: give unlabelled queries, benign ones, or both")
    if queries and not any(query.modalities == {"text"} for query in queries):
        raise InputError("the calibration queries have no text alone: re-centring moves the other surfaces onto text's")
    harmful = next((query.id for query in benign if query.label == "harmful"), None)
    if harmful is not None:
        raise InputError(f"query {harmful} is harmful: the threshold is set on benign prompts alone")
    if benign and not any(query.modalities == {"text"} for query in benign):
        raise InputError(
            "the benign calibration prompts have no text alone: it is the threshold of other surfaces, too"
        )
    media = next((query.id for query in labelled if query.modalities != {"text"}), None)
    if media is not None:
        raise InputError(f"query {media}: the direction is fitted on text alone; leave out images and audio")
    if labelled and {query.label for query in labelled} != {"harmful", "benign"}:
        raise InputError("the labelled calibration queries need a label each, and both harmful and benign ones")


def fit_means(
    omni: Omni, gate: SafetyGate, queries: Sequence[Query], labelled: Sequence[Query], batch_size: int
) -> Calibration:
    """A `Calibration` without log-odds, from unlabelled `queries` of all surfaces and, if any, `labelled` text.

    Raises:
        InputError: prompts of a surface that do not spread along the direction, or labelled ones of equal mean.
    """
    states, surfaces = prompt_states(omni, gate, queries, batch_size)
    groups = {name: states[surfaces == index] for index, name in enumerate(SURFACES) if (surfaces == index).any()}
    means = {name: group.mean(dim=0) for name, group in groups.items()}
    counts = {name: len(group) for name, group in groups.items()}
    if not labelled:
        return Calibration(means, counts)
    of_text, _ = prompt_states(omni, gate, labelled, batch_size)
    harmful = torch.tensor([query.label == "harmful" for query in labelled])
    difference = of_text[harmful].mean(dim=0) - of_text[~harmful].mean(dim=0)
    if not bool((difference.norm(dim=-1) > 0).all()):
        raise InputError("the labelled calibration queries have the same mean state in both classes: give others")
    directions = difference / difference.norm(dim=-1, keepdim=True)
    spreads = {name: _along(group, directions).std(dim=0, correction=0) for name, group in groups.items()}
    flat = next((name for name, spread in spreads.items() if not bool((spread > 0).all())), None)
    if flat is not None:
        raise InputError(
            f"the {counts[flat]} calibration queries with {flat} do not differ: give several different ones"
        )
    return Calibration(means, counts, directions, spreads)


def prompt_states(omni: Omni, gate: SafetyGate, queries: Sequence[Query], batch_size: int) -> tuple[Tensor, LongTensor]:
    """The two states of each prompt [query, 2, d_model], float32, and the indices of their surfaces [query]."""
    states = torch.empty(len(queries), 2, omni.d_model)
    surfaces = torch.empty(len(queries), dtype=torch.long)
    with torch.no_grad():
        for group in omni.batches(queries, batch_size):
            batch = omni.encode([queries[index] for index in group], prefill=False).to(omni.device)
            row = torch.arange(batch.size, device=omni.device)
            none = torch.full_like(row, -1)
            cuts = [Cut("mean", row, none, none, gate.mask(batch)), make_cut(batch, "last")]
            captured = capture_cuts(omni, batch, [gate.layer, "norm"], cuts)
            pair = torch.stack([captured[gate.layer][0], captured["norm"][1]], dim=1)
            check_decision("a state that the gate is calibrated on", pair, [queries[index] for index in group])
            states[group] = pair.to("cpu", torch.float32)
            surfaces[group] = surfaces_of(batch).cpu()
    return states, surfaces


def _along(states: Tensor, directions: Tensor) -> Tensor:
    """Components [query, 2] of states [query, 2, d_model] along directions [2, d_model]."""
    return (states * directions).sum(dim=-1)


def _shifted(states: Tensor, shifts: Tensor) -> Tensor:
    """States [batch, (position,) d_model] moved by a vector a row, `shifts` [batch, d_model]."""
    return states + shifts.to(states.dtype).view(len(shifts), *[1] * (states.dim() - 2), -1)


def _stretched(states: Tensor, stretches: Tensor, centre: Tensor, direction: Tensor) -> Tensor:
    """States [batch, (position,) d_model] whose component along `direction` [d_model] from `centre` [d_model] grows by
    `stretches` [batch] times itself."""
    component = (states.to(torch.float32) - centre) @ direction
    amounts = stretches.view(-1, *[1] * (component.dim() - 1)) * component
    return states + (amounts.unsqueeze(-1) * direction).to(states.dtype)
