"""The grid: defence × attack × label × seed, every cell kept under the hash of what determines it.

Cells are artifacts of a run folder. What is there is never computed again: a new row computes its own cells only, and a
grid that was killed goes on in the middle of the cell, or of the training, that it was at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
from tqdm import tqdm

from casa_mech.compare.sets import Cell, QuerySets
from casa_mech.compare.systems import ComparedSystem, check_systems
from casa_mech.compare.timing import TIMED_ATTACKS, TIMED_QUERIES, Timing, relative_seconds
from casa_mech.compare.tuning import ALPHAS, BENIGN_LOSS, CURVE_COLUMNS, alpha_curve
from casa_mech.compare.weights import Weights, training_cost
from casa_mech.defenses import Defense, load_defense, prompts
from casa_mech.defenses.casa import world_prompts
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import evaluate
from casa_mech.files import remove_folder, write_text
from casa_mech.identity import json_digest, key_digest, queries_digest
from casa_mech.judging import Judge, KeywordJudge, MicroWorldJudge
from casa_mech.judging.stats import clusters_of
from casa_mech.judging.verdict import judge_identity
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.queries import Query
from casa_mech.queries.files import read_files
from casa_mech.study.folder import RunFolder
from casa_mech.study.manifest import data_hashes

_SCHEMA = 1
GENERATION = GenerationSettings(max_new_tokens=32, batch_size=64)
ROUNDS = 3
CALIBRATION_REQUESTS = 50
"""Most requests of each label and surface of the micro-world that CoCA's alpha is chosen on."""
COST_COLUMNS = (
    "model", "defense", "seed", "forwards_per_token", "extra_forwards", "trained_parameters", "training_seconds",
    "training_steps", "training_failed", "relative_seconds", "relative_low", "relative_high", "query_seconds", "timed",
)  # fmt: skip


_NAN = float("nan")
_UNTIMED = Timing(seconds=_NAN, plain_seconds=_NAN, ratio=_NAN, low=_NAN, high=_NAN, n=0)


@dataclass(frozen=True)
class GridResult:
    """The replies and costs of a filled grid."""

    replies: pd.DataFrame
    """`evaluate.REPLY_COLUMNS`, `seed`, `gate_seed` (the training's; 0 for a row without training), `cluster` (what
    counts as one draw), and `gate_score`: how malicious a query is to the defence (v_s, a token's share, a risk), NaN
    where it does not say."""
    costs: pd.DataFrame
    """`COST_COLUMNS`, a row for each defence and seed."""
    computed: int
    """Cells that were computed now."""
    reused: int
    """Cells that were there already."""
    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(CURVE_COLUMNS)))
    """What alpha was chosen on for each row of CoCA (`tuning.CURVE_COLUMNS`)."""


@dataclass
class Grid:
    """A grid to be filled."""

    omni: Omni
    """The model. It must carry no adapter and no gate, and is left as it was."""
    systems: Sequence[ComparedSystem]
    """The rows."""
    sets: QuerySets
    """The columns."""
    seeds: Sequence[int]
    """Each draws training and evaluation anew."""
    folder: RunFolder
    """Where cells are kept."""
    weights: Weights
    """Where trained rows come from."""
    generation: GenerationSettings = GENERATION
    """How replies are generated; their seed is the grid's."""
    judge: Judge | None = None
    """None: the exact one for the micro-world on a model of it, else the keyword judge."""
    rounds: int = ROUNDS
    """Rounds of timing, under the first seed; 0 for none."""
    progress: bool = True
    """Draw a bar."""
    _digests: dict[tuple[Cell, int], str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_systems(self.systems)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds must be different whole numbers, 0 or more; got {list(self.seeds)}")
        if self.judge is None:
            exact = self.sets.micro_world and self.omni.speaks_micro_world
            self.judge = MicroWorldJudge() if exact else KeywordJudge()
        for system in self.systems:
            fitted = {"prototypes", "calibration"} <= set(system.options)
            if system.defense == "moras" and not fitted and not self.omni.speaks_micro_world:
                raise InputError(
                    "defense 'moras' needs queries to be fitted on: set its options prototypes and calibration, or "
                    "leave it out (--defenses)"
                )
            if system.calibrates and not self.omni.speaks_micro_world:
                raise InputError(
                    f"{system.label!r} needs queries to be calibrated on: set its option calibration, or leave it out "
                    "(--defenses)"
                )
            if system.tunes and not system.tuning and not self.omni.speaks_micro_world:
                raise InputError(
                    f"{system.label!r} needs queries to choose alpha on: set tuning, or its option alpha, or leave it "
                    "out (--defenses)"
                )

    def fill(self) -> GridResult:
        """Compute what is missing, a defence at a time, and read the rest.

        Raises:
            InputError: an option or query that cannot be used. RunError: a folder or judge that cannot.
        """
        replies: list[pd.DataFrame] = []
        costs: list[dict[str, Any]] = []
        curves = {system.label: self.alpha_curve(system) for system in self.systems if system.tunes}
        computed = 0
        total = len(self.seeds) * len(self.systems) * len(self.sets.cells())
        with tqdm(total=total, desc="grid", unit="cell", disable=not self.progress) as bar:
            for seed in self.seeds:
                for cell in self.sets.cells():
                    # A set that cannot be read, or a prompt too long, stops the grid before anything is generated.
                    self.digest(cell, seed)
                    self.omni.check_lengths(self.queries(cell, seed), self.generation.system)
                for system in self.systems:
                    bar.set_postfix_str(f"{system.label}, seed {seed}")
                    row = _Row(self, _with_alpha(system, curves), seed)
                    with row:
                        for cell in self.sets.cells():
                            replies.append(row.replies(cell))
                            bar.update()
                        costs.append(row.costs())
                    computed += row.computed
        table = pd.concat(replies, ignore_index=True)
        table["cluster"] = [str(cluster) for cluster in clusters_of(table)]
        chosen = [curve.assign(model=self.omni.source, defense=label) for label, curve in curves.items()]
        curve = pd.concat(chosen)[list(CURVE_COLUMNS)] if chosen else pd.DataFrame(columns=list(CURVE_COLUMNS))
        costs_table = pd.DataFrame(costs, columns=list(COST_COLUMNS))
        return GridResult(table, costs_table, computed, total - computed, curve.reset_index(drop=True))

    def alpha_curve(self, system: ComparedSystem) -> pd.DataFrame:
        """What alpha of a row of CoCA is chosen on, once for the model, whatever seeds the grid has."""
        assert self.judge is not None
        queries = [query for source in system.tuning for query in read_files(source)]
        queries = queries or world_prompts(self._calibration_requests(), Draw.CALIBRATION)
        key = {
            "schema": _SCHEMA,
            "model": self.omni.fingerprint(),
            "safety_prompt": system.safety_prompt,
            "options": system.options,
            "alphas": ALPHAS,
            "loss": BENIGN_LOSS,
            "queries": queries_digest(queries),
            "generation": self.generation.model_dump(mode="json"),
            "judge": judge_identity(self.judge),
            "texts": _texts(),
            "data": key_digest(data_hashes()),
        }

        def build(new: Path) -> None:
            judge = self.judge
            assert judge is not None
            curve = alpha_curve(self.omni, queries, judge, self.generation, system.safety_prompt, system.options)
            curve.to_csv(new / "curve.csv", index=False)

        return pd.read_csv(self.folder.artifact("alpha", key_digest(key), key, build) / "curve.csv")

    def queries(self, cell: Cell, seed: int) -> list[Query]:
        """The queries of a column."""
        return self.sets.queries(cell, seed, self.omni)

    def _calibration_requests(self) -> int:
        """As many of each label and surface as a column has, at most `CALIBRATION_REQUESTS`."""
        columns = (len(self.queries(cell, self.seeds[0])) for cell in self.sets.cells())
        return min(CALIBRATION_REQUESTS, *columns)

    def digest(self, cell: Cell, seed: int) -> str:
        """The digest of a column's queries."""
        if (cell, seed) not in self._digests:
            self._digests[cell, seed] = queries_digest(self.queries(cell, seed))
        return self._digests[cell, seed]

    @cached_property
    def plain(self) -> Omni:
        """The same model a second time, for the side of a timing that carries no adapter."""
        return load_omni(self.omni.source, device=str(self.omni.device), dtype=str(self.omni.dtype).split(".")[-1])


class _Row:
    """One defence under one seed. It is loaded when the first missing piece asks for it, and closed at the end."""

    def __init__(self, grid: Grid, system: ComparedSystem, seed: int) -> None:
        self.grid, self.system, self.seed = grid, system, seed
        self.computed = 0
        self._stack = ExitStack()
        self._weights_key = grid.weights.key(system, seed, grid.omni) if system.trains else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def defense(self) -> Defense:
        """The defence, on the model until the row is closed."""
        path = self.grid.weights.find(self.system, self.seed, self.grid.omni) if self.system.trains else None
        loaded = load_defense(
            self.system.defense, self.grid.omni, safety_prompt=self.system.safety_prompt, path=path,
            **self.system.used(self.seed),
        )  # fmt: skip
        return self._stack.enter_context(loaded)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The defence's `identity` and `describe`, kept so that a row whose cells are all there needs no loading."""
        key = {
            "schema": _SCHEMA,
            "defense": self.system.defense,
            "safety_prompt": self.system.safety_prompt,
            "settings": self.system.settings(self.seed),
            "weights": self._weights_key,
            "texts": _texts(),
            "data": key_digest(data_hashes()),
            "model": self.grid.omni.fingerprint(),
        }

        def build(new: Path) -> None:
            record = {"identity": self.defense.identity, "description": self.defense.describe().model_dump(mode="json")}
            write_text(new / "system.json", json.dumps(record, indent=2) + "\n")

        folder = self.grid.folder.artifact("systems", key_digest(key), key, build)
        record: dict[str, Any] = json.loads((folder / "system.json").read_text(encoding="utf-8"))
        return record

    def replies(self, cell: Cell) -> pd.DataFrame:
        """The cell's table, computed now or read."""
        grid = self.grid
        assert grid.judge is not None
        queries, settings = grid.queries(cell, self.seed), grid.generation.model_copy(update={"seed": self.seed})
        key = {
            **self._key,
            "attack": cell.attack,
            "label": cell.label,
            "n": len(queries),
            "queries": grid.digest(cell, self.seed),
            "generation": settings.model_dump(mode="json"),
            "judge": judge_identity(grid.judge),
        }

        def build(new: Path) -> None:
            self.computed += 1
            work = grid.folder.path("work", key_digest(key))
            shared: dict[str, Any] = {"defense": self.system.label, "settings": settings, "store": work}
            replies = evaluate(grid.omni, self.defense, queries, grid.judge, identity=key, **shared).replies
            replies["gate_score"] = self._scores(replies, queries, settings)
            replies.to_parquet(new / "replies.parquet")
            remove_folder(work)

        folder = grid.folder.artifact("cells", key_digest(key), key, build)
        table = pd.read_parquet(folder / "replies.parquet")
        # Names are no part of the key: a row may be called otherwise than when it was computed.
        return table.assign(
            model=grid.omni.source, defense=self.system.label, attack=cell.attack, seed=self.seed,
            gate_seed=self.seed if self.system.trains else 0,
        )  # fmt: skip

    def costs(self) -> dict[str, Any]:
        """`COST_COLUMNS` of the row."""
        grid, description = self.grid, self.record["description"]
        seconds, steps = (
            training_cost(grid.weights.find(self.system, self.seed, grid.omni))
            if self.system.trains
            else (float("nan"), 0)
        )
        timing = self._timing()
        return {
            "model": grid.omni.source,
            "defense": self.system.label,
            "seed": self.seed,
            **{name: description[name] for name in ("forwards_per_token", "extra_forwards", "trained_parameters")},
            "training_seconds": seconds,
            "training_steps": steps,
            "training_failed": float(bool(description["failed"])) if self.system.trains else float("nan"),
            "relative_seconds": timing.ratio,
            "relative_low": timing.low,
            "relative_high": timing.high,
            "query_seconds": timing.seconds,
            "timed": timing.n,
        }

    @cached_property
    def _key(self) -> dict[str, Any]:
        """All that the cells of the row have in common in their keys."""
        return {
            "schema": _SCHEMA,
            "model": self.grid.omni.fingerprint(),
            "defense": self.system.defense,
            "identity": self.record["identity"],
            "weights": None if self._weights_key is None else key_digest(self._weights_key),
            "seed": self.seed,
        }

    def _scores(self, replies: pd.DataFrame, queries: Sequence[Query], settings: GenerationSettings) -> list[float]:
        if replies["v_s"].notna().all():
            return [float(value) for value in replies["v_s"]]
        if self.defense.has_scores:
            return self.defense.scores(queries, settings)
        return [float("nan")] * len(replies)

    def _timing(self) -> Timing:
        grid = self.grid
        itself = self.system.defense == "none" and not self.system.safety_prompt
        # How long a query takes is no matter of the seed.
        if itself or not grid.rounds or self.seed != grid.seeds[0]:
            return _UNTIMED
        cells = _timed(grid.sets.cells())
        groups = [grid.queries(cell, self.seed)[:TIMED_QUERIES] for cell in cells]
        key = {
            **self._key,
            "queries": [queries_digest(group) for group in groups],
            "rounds": grid.rounds,
            "device": grid.omni.device.type,
            "dtype": str(grid.omni.dtype),
        }

        def build(new: Path) -> None:
            # A defence that leaves the weights alone is held against the very model that it decodes with.
            plain = grid.plain if "weights" in self.record["description"]["changes"] else grid.omni
            timing = relative_seconds(self.defense, plain, groups, grid.rounds)
            write_text(new / "timing.json", json.dumps(vars(timing), indent=2) + "\n")

        folder = grid.folder.artifact("timings", key_digest(key), key, build)
        return Timing(**json.loads((folder / "timing.json").read_text(encoding="utf-8")))


def _with_alpha(system: ComparedSystem, curves: Mapping[str, pd.DataFrame]) -> ComparedSystem:
    """A row of CoCA without an alpha with the one that its curve marks; any other as it is."""
    if system.label not in curves:
        return system
    curve = curves[system.label]
    alpha = float(curve.loc[curve["chosen"], "alpha"].iloc[0])
    options = {**system.options, "alpha": alpha}
    return system.model_copy(update={"options": options, "tuning": (), "name": system.label})


def _timed(cells: Iterable[Cell]) -> list[Cell]:
    """The columns whose queries are timed: harmful text, picture and clip, or the first three."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.attack, cell)
    known = [first[attack] for attack in TIMED_ATTACKS if attack in first]
    return known or list(first.values())[:3]


def _texts() -> str:
    """A digest of the texts that defences say to a model."""
    said = [sorted((name, *text) for name, text in prompts.DEFENSE_TEXTS.items()), prompts.REFUSALS]
    return json_digest(said)
