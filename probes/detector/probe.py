"""`PromptProbe`: a trained probe that reads prompts and replies of its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from casa_mech.errors import InputError, RunError, missing_extra
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import auroc_interval, cluster_of
from casa_mech.omni import Omni, ReplyStream
from casa_mech.omni.load import load
from casa_mech.queries import Prompt, Query
from casa_mech.trace.capture import Positions, make_cut
from casa_mech.trace.sites import Site, all_sites
from casa_mech.trace.standing import standing_edits
from probes.activations.forward import fingerprint
from probes.activations.memory import collect, collect_tokens
from probes.detector.calibration import Sigmoid, Threshold, threshold_at
from probes.detector.report import ProbeReport
from probes.linear.estimators import PROBES, Probe, load_probe, save_probe
from probes.linear.token_probes import TOKEN_PROBES, TokenProbe

AnyProbe = Probe | TokenProbe


@dataclass(frozen=True)
class PromptProbe:
    """A fitted probe of one model's prompts: `probe("a prompt")` is its score, from 0 (benign) to 1 (harmful).

    Scores are calibrated as if harmful and benign prompts were equally frequent.
    """

    estimator: AnyProbe
    """The classifier, fitted on all prompts."""
    site: str
    """Where the states are read (`casa_mech.trace.sites.Site`)."""
    positions: Positions
    """Which positions are read (`casa_mech.trace.capture.Positions`)."""
    scale: float
    """Standard deviation of the estimator's decision values over the prompts that it was fitted on; decisions are in
    this unit."""
    calibration: Sigmoid
    """From decisions to scores, fitted on held-out ones."""
    difference: np.ndarray
    """[d_model]: mean of the harmful minus mean of the benign prompts' states at the site, a direction to steer by."""
    held_out: pd.DataFrame
    """One row a prompt, `query_id, label, cluster, site, decision, score`: by a probe that saw no prompt of that
    cluster, at the site that was chosen without them."""
    layers: pd.DataFrame
    """AUROC by site (`ProbeReport.layers`)."""
    controls: pd.DataFrame
    """The controls (`ProbeReport.controls`)."""
    seed: int
    """Of folds and intervals."""
    fingerprint: str
    """Of the model that it was trained on, LoRA included."""
    source: str
    """Where that model came from."""
    omni: Omni = field(repr=False, compare=False)
    """The model that is read."""

    @property
    def auroc(self) -> Estimate:
        """AUROC on held-out prompts, the choice of layer and penalty included, with its interval over topics."""
        harmful = (self.held_out["label"] == "harmful").tolist()
        return auroc_interval(self.held_out["decision"].tolist(), harmful, self.held_out["cluster"].tolist(), self.seed)

    @overload
    def __call__(self, prompts: Prompt, batch_size: int = 32) -> float: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, prompts: Sequence[Prompt], batch_size: int = 32) -> np.ndarray: ...
    def __call__(self, prompts: Prompt | Sequence[Prompt], batch_size: int = 32) -> float | np.ndarray:
        """The score of one prompt, or scores [prompt] of several; a prefill is left out.

        Raises:
            InputError: no prompts, one that cannot be encoded, or a model that has changed since.
        """
        if isinstance(prompts, str | Query):
            return float(self([prompts], batch_size)[0])
        if not len(prompts):
            raise InputError("`prompts` is empty: give a list of prompts")
        self._check_model()
        queries, site = self.omni.queries(prompts), self._site
        states: Any
        if self._of_tokens:
            states = collect_tokens(self.omni, queries, [site], self.positions, batch_size, False)[self.site]
        else:
            states = collect(self.omni, queries, [site], self.positions, batch_size, False).at(self.site)
        return self._scores(states)

    def at(self, fpr: float, benign: Sequence[Prompt] | None = None) -> Threshold:
        """The threshold on scores that flags at most `fpr` of benign prompts like these, with its interval.

        Args:
            fpr: such as 0.01, which takes 99 topics; with fewer, `Threshold.enough` is False and its text says so.
            benign: prompts that the probe was not trained on; default the held-out benign ones of its training.

        Raises:
            InputError: a rate that is none, or no benign prompts.
        """
        if benign is None:
            rows = self.held_out[self.held_out["label"] == "benign"]
            return threshold_at(fpr, rows["score"].to_numpy(), rows["cluster"].tolist(), self.seed)
        clusters = [cluster_of(query) for query in self.omni.queries(benign)]
        return threshold_at(fpr, self(benign) if clusters else np.zeros(0), clusters, self.seed)

    def watch(self, stream: ReplyStream) -> Iterator[tuple[str, float]]:
        """(token, score) for each token of a reply while the model writes it.

        A token's score is of what was read before it was written: the first is the prompt's own (with its prefill, if
        it has one), each further one is made as if the reply so far belonged to the prompt. "last" reads the newest
        token, a mean and the probes of tokens read the prompt's positions and all of the reply.

        Example:
            ```python
            for token, score in probe.watch(model.stream("how do i make a cake ?")):
                print(f"{token} {score:.2f}")
            ```

        Raises:
            InputError: a stream of another model, one that was begun before, or a prompt without such positions.
        """
        self._check_model()
        if not isinstance(stream, ReplyStream):
            raise InputError(f"watch takes model.stream(...), not a {type(stream).__name__}")
        if stream.omni is not self.omni and fingerprint(stream.omni) != self.fingerprint:
            raise InputError(f"the stream is of another model ({stream.omni.source}) than the probe's ({self.source})")
        if stream.ids:
            raise InputError("the stream was begun before: make another with model.stream(...)")
        return self._watched(stream)

    def report(self) -> ProbeReport:
        """AUROC by layer with intervals, the chosen layer's nested choice, and the controls."""
        return ProbeReport(self._title, self.auroc, self.layers, self.controls)

    def plot(self, title: str = "") -> Any:
        """A matplotlib figure of the AUROC by layer with its interval, and what shuffled labels reach.

        Raises:
            InputError: matplotlib is not installed; the message names the extra that brings it.
        """
        try:
            from probes.linear.plots import plot_probes
        except ImportError as error:
            raise InputError(missing_extra(error) or str(error)) from None

        own = self.layers.assign(measure="probe")
        chance = self.layers.assign(
            measure="permuted", low=self.layers["permuted_low"], high=self.layers["permuted_high"]
        )
        data = pd.concat([own, chance], ignore_index=True).assign(positions=self.positions, surface="prompts")
        claim = f"{self.estimator._kind} probe of {Path(self.source).name}: AUROC {self.auroc.text()}"
        caption = "In the title the layer is chosen without the prompts held out; dotted: the one that the probe reads."
        figure = plot_probes(data, title or claim, caption)
        figure.axes[0].axvline(int(self.layers["chosen"].to_numpy().argmax()), color="black", linestyle=":")
        return figure

    def on(self, model: Omni) -> PromptProbe:
        """The same probe on another model on purpose, such as a finetuned one: a measurement of transfer.

        Raises:
            InputError: a model of another width.
        """
        if model.d_model != len(self.difference):
            width = len(self.difference)
            raise InputError(
                f"a probe of states {width} wide cannot read {model.source}, which is {model.d_model} wide"
            )
        return replace(self, omni=model, fingerprint=fingerprint(model), source=model.source)

    def save(self, path: Path | str) -> None:
        """Write the probe to `path`, a safetensors file; `PromptProbe.load` reads it. Prompts are not in it."""
        codes = {name: number for number, name in enumerate(dict.fromkeys(self.held_out["cluster"]))}
        held_out = self.held_out.assign(cluster=[str(codes[name]) for name in self.held_out["cluster"]])
        about = {
            "site": self.site, "positions": self.positions, "scale": self.scale, "seed": self.seed,
            "calibration": [self.calibration.slope, self.calibration.offset],
            "difference": self.difference.tolist(), "fingerprint": self.fingerprint, "source": self.source,
            **{name: table.to_dict("list") for name, table in (
                ("held_out", held_out), ("layers", self.layers), ("controls", self.controls))},
        }  # fmt: skip
        save_probe(self.estimator, path, about)

    @classmethod
    def load(cls, path: Path | str, model: Omni | str | Path | None = None) -> PromptProbe:
        """The probe that `save` wrote, on its model.

        Args:
            path: the file.
            model: the model that it was trained on, or its id or directory; None: from where it came then.

        Raises:
            RunError: no such probe, or another model than it was trained on. ModelError: the model cannot be loaded.
        """
        estimator, about = load_probe(path, kinds={**PROBES, **TOKEN_PROBES})
        try:
            tables = {name: pd.DataFrame(about[name]) for name in ("held_out", "layers", "controls")}
            known = {name: about[name] for name in ("site", "positions", "scale", "seed", "fingerprint", "source")}
            calibration = Sigmoid(*about["calibration"])
            difference = np.array(about["difference"], dtype=np.float32)
        except (KeyError, TypeError, ValueError):
            raise RunError(
                f"{path} is a classifier without its model: probes.linear.load_probe reads it; save probes of prompts "
                "with PromptProbe.save"
            ) from None
        omni = model if isinstance(model, Omni) else load(model or known["source"])
        if fingerprint(omni) != known["fingerprint"]:
            raise RunError(
                f"{path} was trained on {known['source']} ({known['fingerprint'][:8]}…), not on {omni.source} as it is "
                f"now ({fingerprint(omni)[:8]}…): give that model"
            )
        return cls(estimator=estimator, calibration=calibration, difference=difference, omni=omni, **known, **tables)

    def __str__(self) -> str:
        return f"{self._title}: AUROC {self.auroc.text('.3f')} on held-out prompts"

    @property
    def _title(self) -> str:
        harmful = int((self.held_out["label"] == "harmful").sum())
        return (
            f"{self.estimator._kind} probe of {self.source} at site {self.site}, positions {self.positions} ({harmful} "
            f"harmful, {len(self.held_out) - harmful} benign)"
        )

    @property
    def _of_tokens(self) -> bool:
        return isinstance(self.estimator, TokenProbe)

    @property
    def _site(self) -> Site:
        return {str(site): site for site in all_sites(self.omni.n_layers)}[self.site]

    def _check_model(self) -> None:
        now = fingerprint(self.omni)
        if now != self.fingerprint:
            raise InputError(
                f"the probe was trained on {self.source} as it was ({self.fingerprint[:8]}…), and the model has "
                f"changed ({now[:8]}…): detach what was attached since, or read it all the same by probe.on(model)"
            )

    def _scores(self, states: Any) -> np.ndarray:
        return self.calibration(self.estimator.decision_function(states) / self.scale)

    def _watched(self, stream: ReplyStream) -> Iterator[tuple[str, float]]:
        read: list[Tensor] = []

        def record(states: Tensor) -> Tensor:
            read.append(states.detach()[0].float().cpu())
            return states

        seen, averaged = np.zeros((0, 0)), self.positions.startswith("mean")
        while True:
            # Only while the model writes a token: in between it is the caller's.
            with standing_edits(stream.omni, {self._site: record}):
                token = next(stream, None)
            if token is None:
                return
            new = self._of_prompt(stream, read.pop()) if not len(seen) else read.pop().numpy()
            seen = np.concatenate([seen, new]) if len(seen) else new
            if self._of_tokens:
                scores = self._scores([seen])
            else:
                scores = self._scores(seen.mean(axis=0, keepdims=True) if averaged else seen[-1:])
            yield token, float(scores[0])

    def _of_prompt(self, stream: ReplyStream, states: Tensor) -> np.ndarray:
        """The states [token, size] of `states` [position, size] that the probe reads of the prompt and its prefill."""
        batch = stream.batch.to("cpu")
        cut = make_cut(batch, self.positions)
        if not len(cut.row):
            raise InputError(f"query {stream.query.id} has no positions {self.positions!r} to watch from")
        column = cut.column if cut.mask is None else cut.mask[0].nonzero()[:, 0]
        prefill = torch.arange(int(batch.gate_position[0]) + 1, int(batch.last_position[0]) + 1)
        return states[torch.cat([column, prefill])].numpy()
