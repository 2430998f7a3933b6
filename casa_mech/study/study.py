"""`Study`: what the notebooks share. Each piece is made once in the run folder and found there by whoever asks next."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from matplotlib.figure import Figure

from casa_mech.casa import Casa, CasaConfig, TrainSettings
from casa_mech.casa.generation import Order
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.evaluation.envelope import batch_envelope
from casa_mech.evaluation.evaluate import CASA, PRETRAINED, evaluate, result_rows
from casa_mech.figures import save_figure
from casa_mech.files import remove_folder, write_text
from casa_mech.identity import file_sha256, key_digest, query_digest
from casa_mech.judging import KeywordJudge, write_table
from casa_mech.judging.stats import cluster_of
from casa_mech.judging.verdict import Judge
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.omni.untrained import untrained
from casa_mech.plan import WORLD, OwnData, StudyData, read_plan, world_data
from casa_mech.processes import Note, in_processes
from casa_mech.queries import Example, Label, Query
from casa_mech.study.folder import RunFolder, is_complete
from casa_mech.study.manifest import ENVELOPE_FILE, ENVELOPES, data_hashes
from casa_mech.study.settings import Profile, StudySettings, settings_of, slug
from probes.activations import Activations, ActivationStore
from probes.activations.shards import FORMAT

PREFILL_FIRST = "CASA, prefill first"
"""CASA with the attacker's tokens before the gate (`prefill_first`). Plain `CASA` decides right after the header."""
LABELS: tuple[Label, ...] = ("harmful", "benign")
ProbePositions = Literal["last", "last:user", "mean"]
"""Where probes read (`casa_mech.trace.capture.Positions`)."""
Moment = Literal["before", "after"]
"""Of a gate's training."""
ENVELOPE_QUERIES = 6
"""Requests for each surface and label that the envelope of batches is measured on."""
_POLL_SECONDS = 0.5


class Study:
    """One study on one run folder. Make it with `Study.open`."""

    def __init__(self, settings: StudySettings, sizes: Profile, folder: RunFolder, progress: bool) -> None:
        self.settings, self.sizes, self.folder, self.progress = settings, sizes, folder, progress
        self._omnis: dict[str, Omni] = {}
        self._gates: dict[tuple[str, int], Casa] = {}

    @classmethod
    def open(
        cls, out: str | Path = "", *, progress: bool = True, sizes: Mapping[str, int] | None = None, **settings: object
    ) -> Study:
        """Open or begin a study.

        Args:
            out: the run folder; empty: `runs/<model>-<profile>-seed<seed>` under the working directory.
            progress: whether to draw bars.
            sizes: numbers that take the place of the profile's (see `Profile`); zeros are passed over.
            settings: fields of `StudySettings`.

        Raises:
            InputError: a setting or size that does not fit. RunError: a run folder that cannot be used.
        """
        checked = settings_of(**settings)
        changed = {name: value for name, value in (sizes or {}).items() if value}
        for name, value in changed.items():
            if name not in Profile.model_fields or value < 1:
                raise InputError(f"{name}={value}: sizes are {', '.join(Profile.model_fields)}, each at least 1")
        folder = RunFolder.open(out or checked.default_folder, checked)
        return cls(checked, checked.sizes.model_copy(update=changed), folder, progress)

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the attack table; the first is the one under study."""
        return self.settings.models

    @property
    def name(self) -> str:
        """The model under study, as file names call it."""
        return slug(self.settings.model)

    @property
    def title(self) -> str:
        """The model under study, and the plan if it is not the micro-world, as claims and titles call them."""
        return self.name if self.data.micro_world else f"{self.name} on plan {self.data.name}"

    # The models

    def omni(self, model: str = "") -> Omni:
        """The model (default: the one under study), loaded once and written down for the manifest."""
        model = model or self.settings.model
        if model not in self._omnis:
            omni = self.new_omni(model)
            record = {
                "source": model,
                "fingerprint": omni.fingerprint(),
                "parameters": sum(weight.numel() for weight in omni.model.parameters()),
                "d_model": omni.d_model,
                "n_layers": omni.n_layers,
                "device": str(omni.device),
                "dtype": str(omni.dtype).removeprefix("torch."),
            }
            write_text(self.folder.path("models", f"{slug(model)}.json"), json.dumps(record, indent=2) + "\n")
            self._omnis[model] = omni
        return self._omnis[model]

    def new_omni(self, model: str = "") -> Omni:
        """Another copy of the model, for weights that are changed: two adapters cannot be in one copy at once."""
        settings = self.settings
        return load_omni(model or settings.model, device=settings.device, dtype=settings.dtype)

    @contextmanager
    def without_gate(self, model: str = "") -> Iterator[Omni]:
        """The model as it was loaded, for the length of a block, whether or not a gate is attached to it."""
        casa = self._gates.get((model or self.settings.model, 0))
        with casa.disabled() if casa else nullcontext():
            yield self.omni(model)

    def judge(self, model: str = "") -> Judge:
        """The plan's: of the micro-world the exact one, where the model speaks it."""
        if self.data.micro_world and not self.omni(model).speaks_micro_world:
            return KeywordJudge()
        return self.data.judge()

    # What it is about

    @cached_property
    def data(self) -> StudyData:
        """The plan's prompts."""
        name = self.settings.plan_name
        return world_data() if name == WORLD else OwnData(read_plan(name), self._note)

    @property
    def attacks(self) -> tuple[str, ...]:
        """Columns of the attack table that the models read."""
        return tuple(name for name in self.data.attacks if self._reads(name))

    @property
    def benign_attacks(self) -> tuple[str, ...]:
        """Those of `attacks` that benign counterparts are put under, too."""
        return tuple(name for name in self.data.benign_attacks if self._reads(name))

    @property
    def surfaces(self) -> dict[str, str]:
        """Surfaces that the models read, each with the attack that puts a plain prompt there."""
        return {surface: name for surface, name in self.data.surfaces.items() if self._reads(name)}

    def lacks(self, part: str) -> str:
        """Why a notebook leaves `part` out, in one line, which the run folder keeps, too; empty if it does not.

        Args:
            part: "pairs", "exact judge", "kinds", "benign sets", or "other surfaces" than text.
        """
        if part == "other surfaces":
            reason = "" if len(self.surfaces) > 1 else f"plan {self.data.name} shows {self.name} text alone"
        else:
            reason = self.data.lacks(part)
        if reason:
            write_text(self.folder.path("left-out", f"{slug(part)}.txt"), reason + "\n")
        return reason

    def _reads(self, attack: str) -> bool:
        return self.data.media(attack) <= set(self.omni().modalities)

    def _note(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr)

    # The gates

    @property
    def gate_numbers(self) -> range:
        """The gates of each model, from 0; what looks into one gate takes gate 0 and says so."""
        return range(self.sizes.gates)

    def gate_seed(self, gate: int) -> int:
        """The seed of a gate's examples and training: the study's own for gate 0, the next for gate 1, ..."""
        return self.settings.seed + gate

    def casa(self, model: str = "", gate: int = 0) -> Casa:
        """CASA trained on plain text, attached; trained on the first call, continued if it was stopped.

        Gate 0 is on the model itself (`omni`), any other on a copy of its own. Of those the last one alone is held
        here: a model and one copy are in memory, however many gates there are.
        """
        model = model or self.settings.model
        if (model, gate) not in self._gates:
            folder = self._gate_folder(model, gate)
            if (model, gate) not in self._gates:
                self._hold(model, gate, Casa.from_pretrained(folder, self._gate_omni(model, gate)))
            if not gate and self._gates[model, gate].omni.dtype.itemsize < 4:
                self._measure_envelope(model)
        return self._gates[model, gate]

    def _measure_envelope(self, model: str) -> None:
        """Write down for the manifest how far a half-precision gate's numbers depend on the batch."""
        casa = self._gates[model, 0]
        key = {"gate": key_digest(self.gate_key(model)), "dtype": str(casa.omni.dtype), "device": casa.omni.device.type}

        def build(folder: Path) -> None:
            surfaces = [(attack, label) for attack in self.surfaces.values() for label in LABELS]
            queries = [query for surface in surfaces for query in self.queries(*surface, ENVELOPE_QUERIES)]
            (folder / ENVELOPE_FILE).write_text(batch_envelope(casa, queries).model_dump_json(indent=2) + "\n")

        self.folder.artifact(ENVELOPES, slug(model), key, build)

    def gates(self, model: str = "") -> Iterator[tuple[int, Casa]]:
        """Every gate of the model with its number, one at a time; those that are missing are trained first."""
        self.train_gates(model)
        for gate in self.gate_numbers:
            yield gate, self.casa(model, gate)

    def train_gates(self, *models: str) -> None:
        """Train the gates of `models` (default: the one under study) that are missing.

        In as many processes as this one has threads, each with one: two of them train two gates in much less than
        twice the time of one. A gate that another process is training is left to it, and waited for.
        """
        missing = [
            (model, gate)
            for model in dict.fromkeys(name or self.settings.model for name in models or ("",))
            for gate in self.gate_numbers
            if not is_complete(self.folder.path("gates", gate_name(slug(model), gate)), self.gate_key(model, gate))
        ]
        jobs = min(torch.get_num_threads() if self.settings.is_small else 1, len(missing))
        if jobs > 1:
            work = partial(_train_in_process, self.settings, self.sizes, self.folder, missing)
            in_processes(work, jobs, "study")
        else:
            self._train_missing(missing)

    def over_gates(self, table: Callable[[int], pd.DataFrame], model: str = "") -> pd.DataFrame:
        """`table(gate)` of every gate of the model, one below the other, with their seeds in the column `gate_seed`."""
        self.train_gates(model)
        tables = [table(gate).assign(gate_seed=self.gate_seed(gate)) for gate in self.gate_numbers]
        return pd.concat(tables, ignore_index=True)

    def _train_missing(self, gates: Sequence[tuple[str, int]], stopped: Callable[[], bool] = lambda: False) -> None:
        """Train each of the gates that no other process is training, until all are there or `stopped`."""
        left = list(gates)
        while left and not stopped():
            left = [gate for gate in left if stopped() or self._gate_folder(*gate, timeout=0) is None]
            if left:
                time.sleep(_POLL_SECONDS)

    def _gate_folder(self, model: str, gate: int, timeout: float = -1) -> Any:
        """The trained gate's folder; None where another process is still training it after `timeout` seconds."""
        name, key = gate_name(slug(model), gate), self.gate_key(model, gate)
        return self.folder.free_artifact("gates", name, key, lambda new: self._train(model, gate, new), timeout)

    def _gate_omni(self, model: str, gate: int) -> Omni:
        return self.new_omni(model) if gate else self.omni(model)

    def _hold(self, model: str, gate: int, casa: Casa) -> None:
        for held in [other for other in self._gates if gate and other[1]]:
            del self._gates[held]
        self._gates[model, gate] = casa

    def _train(self, model: str, gate: int, new: Path) -> None:
        digest = key_digest(self.gate_key(model, gate))
        work = self.folder.path("gates", f"training-{gate_name(slug(model), gate)}-{digest}")
        work.mkdir(parents=True, exist_ok=True)
        casa = Casa.attach(self._gate_omni(model, gate), CasaConfig(), seed=gate)
        settings = self.gate_settings(gate)
        casa.train(self.training_examples(gate, model), settings, out=work, resume=True, progress=self.progress)
        casa.save_pretrained(new)
        shutil.copy(work / "metrics.jsonl", new / "metrics.jsonl")
        remove_folder(work)
        self._hold(model, gate, casa)

    @contextmanager
    def _casa_at(self, model: str, moment: Moment, gate: int) -> Iterator[Casa]:
        """The trained gate, or a freshly attached one on a model of its own."""
        if moment == "after":
            yield self.casa(model, gate)
            return
        casa = Casa.attach(self.new_omni(model), CasaConfig(), seed=gate)
        yield casa
        casa.detach()

    def training_examples(self, gate: int = 0, model: str = "") -> list[Example]:
        """The plain-text requests and replies that a gate of the model is trained on; each gate has its own draw."""
        return self.data.training_examples(
            self.sizes.train_examples, Draw.TRAINING + self.gate_seed(gate), partial(self.own_replies, model=model)
        )

    def own_replies(self, prompts: Sequence[Query], model: str = "") -> list[str]:
        """The model's replies to plain prompts before CASA, made once for a list and kept in the run folder."""
        settings = GenerationSettings(max_new_tokens=self.sizes.max_new_tokens, batch_size=self.sizes.batch_size)
        ids = key_digest({"prompts": [query_digest(query) for query in prompts]})
        key = {"model": self.omni(model).fingerprint(), "prompts": ids, "tokens": settings.max_new_tokens}

        def build() -> pd.DataFrame:
            with self.without_gate(model) as omni:
                replies = omni.generate(prompts, settings, progress=self.progress)
            return pd.DataFrame(
                {"query_id": [query.id for query in prompts], "reply": [reply.text for reply in replies]}
            )

        return self.table("own-replies", f"{slug(model or self.settings.model)}/{ids}", key, build)["reply"].tolist()

    @cached_property
    def train_settings(self) -> TrainSettings:
        """How gates are trained; the seed is gate 0's."""
        return TrainSettings(
            max_steps=self.sizes.train_steps,
            batch_size=self.sizes.train_batch,
            micro_batch_size=min(32, self.sizes.train_batch),
            seed=self.settings.seed,
        )

    def gate_settings(self, gate: int) -> TrainSettings:
        """How this gate is trained."""
        return self.train_settings.model_copy(update={"seed": self.gate_seed(gate)})

    def training_log(self, model: str = "", gate: int = 0) -> pd.DataFrame:
        """Metrics of every training step: `step, loss, v_harmful, v_benign, token_accuracy`, and loss parts."""
        folder = self._gate_folder(model or self.settings.model, gate)
        return pd.read_json(folder / "metrics.jsonl", lines=True)

    # What tables are made of

    def queries(self, attack: str, label: Label, n: int = 0, seed: int = Draw.EVALUATION) -> list[Query]:
        """Requests of the plan under `attack`, the two labels drawn apart.

        Args:
            attack: one of `attacks`, or a name of the registry.
            label: of all of them.
            n: how many; 0: the profile's `n_eval`.
            seed: a `Draw`; the study's own seed is added.
        """
        tokenizer = self.omni().tokenizer
        return self.data.queries(attack, label, n or self.sizes.n_eval, seed + self.settings.seed, tokenizer)

    def attacked(self, attack: str, queries: Sequence[Query], seed: int) -> list[Query]:
        """Plain requests of the plan under `attack`."""
        return self.data.attacked(attack, queries, seed, self.omni().tokenizer)

    def table(
        self, kind: str, name: str, key: Mapping[str, Any], build: Callable[[], pd.DataFrame], stem: str = "table"
    ) -> pd.DataFrame:
        """A table that is made once for a `key`, kept as `<kind>/<name>/<stem>.parquet` in the run folder, then read.

        Args:
            kind, name, key: as for `RunFolder.artifact`.
            build: makes the table.
            stem: the file's name without its suffix.
        """
        folder = self.folder.artifact(kind, name, key, lambda new: build().to_parquet(new / f"{stem}.parquet"))
        return pd.read_parquet(folder / f"{stem}.parquet")

    def gate_table(
        self, name: str, key: Mapping[str, Any], build: Callable[[], pd.DataFrame], gate: int = 0
    ) -> pd.DataFrame:
        """The table `analysis/<name>` on a gate of the model under study, made once for it and `key`."""
        where = gate_name(name, gate)
        return self.table("analysis", where, {"gate": self.gate_digest(gate=gate), **key}, build)

    def model_key(self, model: str = "") -> dict[str, Any]:
        """The part of an artifact's key that stands for the model, the seed and the package's data."""
        data = {"data": key_digest(data_hashes()), **self.data.key()}
        return {"model": self.omni(model).fingerprint(), "seed": self.settings.seed, **data}

    def gate_key(self, model: str = "", gate: int = 0) -> dict[str, Any]:
        """All that a trained gate depends on."""
        settings = self.gate_settings(gate).model_dump(mode="json")
        training = {"examples": self.sizes.train_examples, "train": settings}
        return {**self.model_key(model), **training, "casa": CasaConfig().model_dump(mode="json")}

    def gate_digest(self, model: str = "", gate: int = 0) -> str:
        """SHA-256 of the trained gate's record, which holds its key and the hashes of its files."""
        return file_sha256(self._gate_folder(model or self.settings.model, gate) / "done.json")

    # Tables that several notebooks read

    def probing_queries(self) -> list[Query]:
        """The harmful and benign requests on text, image and audio whose states are read."""
        return [
            query
            for surface, attack in self.surfaces.items()
            if surface != "spelled"
            for label in LABELS
            for query in self.queries(attack, label, self.sizes.n_probe, Draw.PROBING)
        ]

    def activations(
        self, positions: ProbePositions = "last", model: str = "", random_weights: bool = False
    ) -> Activations:
        """Hidden states before CASA of `probing_queries`.

        Args:
            positions: the assistant header's last token, from which the first word is predicted, the user's last token,
                or the prompt's mean.
            model: default the one under study.
            random_weights: the states of its architecture with weights that nobody trained, a control.
        """
        return self.activation_store(model, random_weights).activations(positions)

    def activation_store(self, model: str = "", random_weights: bool = False) -> ActivationStore:
        """The store behind `activations`: every block's output and the final norm's, at each of `ProbePositions`."""
        read = get_args(ProbePositions)
        key = {**self.model_key(model), "n": self.sizes.n_probe, "positions": list(read), "format": FORMAT}
        name = slug(model or self.settings.model) + ("-random-weights" if random_weights else "")

        def build(folder: Path) -> None:
            with self.without_gate(model) as trained:
                omni = untrained(trained, self.settings.seed) if random_weights else trained
                where: dict[str, Any] = {"out": folder / "store", "batch_size": self.sizes.batch_size}
                ActivationStore.collect(omni, self.probing_queries(), None, read, **where, progress=self.progress)

        return ActivationStore.open(self.folder.artifact("activations", name, key, build) / "store")

    def readings(self, model: str = "", gate: int = 0) -> pd.DataFrame:
        """v_s of every probing request, before and after training: `moment, surface, label, split, topic, v_s, ...`.

        `over_gates` puts those of several gates together.
        """
        model = model or self.settings.model
        moments: tuple[Moment, ...] = ("before", "after")
        return pd.concat([self._readings_at(moment, model, gate) for moment in moments], ignore_index=True)

    def _readings_at(self, moment: Moment, model: str, gate: int) -> pd.DataFrame:
        key = {**self.model_key(model), "n": self.sizes.n_probe, "gate": key_digest(self.gate_key(model, gate))}

        def build() -> pd.DataFrame:
            with self._casa_at(model, moment, gate) as casa:
                tables = [self.read_gate(casa, surface, label) for surface in self.surfaces for label in LABELS]
            return pd.concat(tables, ignore_index=True).assign(moment=moment)

        return self.table("readings", f"{gate_name(slug(model), gate)}-{moment}", key, build, "readings")

    def read_gate(self, casa: Casa, surface: str, label: Label) -> pd.DataFrame:
        """Decisions of a gate on the probing requests of a surface and label: `surface, label, topic, ..., v_s`."""
        queries = self.queries(self.surfaces[surface], label, self.sizes.n_probe, Draw.PROBING)
        replies = casa.decide(queries)
        return pd.DataFrame(
            {
                "surface": surface,
                "label": label,
                "topic": [str(cluster_of(query)) for query in queries],
                "split": [query.meta.get("split", "") for query in queries],
                "query_id": [query.id for query in queries],
                "safety_token": [reply.safety_token for reply in replies],
                "v_s": [reply.v_s for reply in replies],
            }
        )

    def replies(self, model: str, defense: str, attack: str, label: Label, gate: int = 0) -> pd.DataFrame:
        """Replies to one cell of the attack table (columns: `evaluate.REPLY_COLUMNS` and `gate_seed`).

        The pretrained model answers `n_eval` requests, and has no gate and no `gate_seed`; a gate answers the first of
        them, its share (see `Profile.n_eval`).
        """
        gated = defense != PRETRAINED
        n = max(1, self.sizes.n_eval // self.sizes.gates) if gated else self.sizes.n_eval
        key = {**self.model_key(model), "n": n, "tokens": self.sizes.max_new_tokens}
        if gated:
            key["gate"] = key_digest(self.gate_key(model, gate))

        def build() -> pd.DataFrame:
            queries = self.queries(attack, label, n)
            settings = GenerationSettings(max_new_tokens=self.sizes.max_new_tokens, batch_size=self.sizes.batch_size)
            shared: dict[str, Any] = {"judge": self.judge(model), "defense": defense, "settings": settings}
            if not gated:
                with self.without_gate(model) as omni:
                    return evaluate(omni, None, queries, **shared).replies
            order: Order = "prefill_first" if defense == PREFILL_FIRST else "gate_first"
            casa = self.casa(model, gate)
            return evaluate(casa.omni, casa, queries, order=order, **shared).replies

        system = defense.lower().replace(", ", "-").replace(" ", "-")
        cell = [slug(model), gate_name(system, gate if gated else 0), attack, label]
        replies = self.table("replies", "/".join(cell), key, build, "replies")
        seed = self.gate_seed(gate) if gated else pd.NA
        return replies.assign(gate_seed=pd.array([seed] * len(replies), dtype="Int64"))

    def cells(self) -> list[tuple[str, str, str, Label]]:
        """The attack table's cells: (model, defense, attack, label)."""
        cells: list[tuple[str, str, str, Label]] = []
        for model in self.models:
            for defense in (PRETRAINED, CASA):
                cells += [(model, defense, attack, "harmful") for attack in self.attacks]
                cells += [(model, defense, attack, "benign") for attack in self.benign_attacks]
            prefills = [attack for attack in self.attacks if "prefill" in attack]
            cells += [(model, PREFILL_FIRST, attack, "harmful") for attack in prefills]
        return cells

    def attack_results(self) -> pd.DataFrame:
        """The attack × model table in the result schema, from the replies to every cell, averaged over gates."""
        from tqdm import tqdm

        self.train_gates(*self.models)
        # Gate by gate, so that each is loaded once.
        cells = [
            (*cell, gate)
            for model in self.models
            for gate in self.gate_numbers
            for cell in self.cells()
            if cell[0] == model and (not gate or cell[1] != PRETRAINED)
        ]
        bar = tqdm(cells, desc="attack table", unit="cell", disable=not self.progress)
        replies = pd.concat([self.replies(*cell) for cell in bar], ignore_index=True)
        return pd.DataFrame(result_rows(replies, self.settings.seed))

    # What notebooks leave

    def save_figure(self, name: str, figure: Figure, data: pd.DataFrame) -> Figure:
        """Save a figure as `figures/<name>` .png, .svg and .csv, and return it to be shown."""
        save_figure(figure, data, self.folder.path("figures", name))
        return figure

    def save_table(self, name: str, rows: Sequence[Any] | pd.DataFrame) -> Path:
        """Write result rows to `tables/<name>.parquet`."""
        return write_table(rows, self.folder.path("tables", f"{name}.parquet"))


def gate_name(name: str, gate: int) -> str:
    """`name` in the run folder of what belongs to a gate: gate 0 has the bare name."""
    return f"{name}-gate{gate}" if gate else name


def _train_in_process(
    settings: StudySettings,
    sizes: Profile,
    folder: RunFolder,
    gates: Sequence[tuple[str, int]],
    note: Note,
    stopped: Callable[[], bool],
) -> None:
    Study(settings, sizes, folder, progress=False)._train_missing(gates, stopped)
