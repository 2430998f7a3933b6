"""The grid of notebook 05, in a study's run folder at the size of its profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from casa_mech.compare.ablations import AXES, Variant
from casa_mech.compare.comparison import Comparison, read_comparison
from casa_mech.compare.grid import Grid
from casa_mech.compare.paired import pairs_of
from casa_mech.compare.sets import DEFAULT_ATTACKS, PlanSets, QuerySets, WorldSets
from casa_mech.compare.systems import DEFAULT_DEFENSES, REFERENCE, SEEDS, ComparedSystem, system_named
from casa_mech.compare.tables import ALL
from casa_mech.compare.weights import TrainingPlan, Weights
from casa_mech.defenses.rerouting import CircuitBreakerSettings
from casa_mech.judging.merit import NOT_REFUSED, with_not_refused
from casa_mech.omni import GenerationSettings
from casa_mech.queries import Example
from casa_mech.study import Study
from casa_mech.study.settings import CLONE, ProfileName, slug


@dataclass(frozen=True)
class GridSizes:
    """Sizes of one grid."""

    n: int
    """Requests in each cell."""
    attacks: tuple[str, ...]
    """The columns."""
    defenses: tuple[str, ...] = ()
    """The rows, by name; those of the ablations follow from `axes` and `only`."""
    seeds: int = 1
    """How many, from the study's on."""
    rounds: int = 0
    """Rounds of timing."""
    steps: int | None = None
    """Steps of each training; None: the study's."""
    axes: tuple[str, ...] = AXES
    """Settings that the ablations change."""
    only: tuple[str, ...] | None = None
    """Variants of the ablations; None: all."""


FOLDER = CLONE / "figures" / "compare"
"""The committed tables of `casa-mech compare`: its folder `summary`."""
_ENOUGH = 3
_NEEDS_MORE = ("coca", "moras", "circuit-breaker", "casa-mended")
SIX_ATTACKS = ("plain", "jailbreak", "spelled", "image", "audio", "prefill-12")
DEFENSE_SIZES: Mapping[ProfileName, GridSizes] = MappingProxyType(
    {
        "smoke": GridSizes(
            10, ("plain", "image"), ("none", "safety-prompt", "ssft-token", "casa", "coca"), rounds=1, steps=4
        ),
        "default": GridSizes(40, SIX_ATTACKS, DEFAULT_DEFENSES, rounds=2),
        "full": GridSizes(200, DEFAULT_ATTACKS, DEFAULT_DEFENSES, seeds=len(SEEDS), rounds=5),
    }
)
"""Of notebook 05; those of the default profile where there are no committed tables of the model."""


def committed_grid(study: Study, kind: str, tables: str = "", n: int = 0) -> Comparison | None:
    """The comparison that `casa-mech compare` made of the study's model, for the default profile; else None.

    Args:
        study: whose model it has to be, to the weights.
        kind: "compare", or "ablations" for the second grid.
        tables: its folder; empty: the committed one.
        n: requests in each cell that the notebook asks for; any number means a grid of its own.
    """
    if study.settings.profile != "default" or n or not study.data.micro_world:
        return None
    name = f"{kind}-{slug(study.settings.model)}"
    return read_comparison(Path(tables) if tables else FOLDER, name, study.omni().fingerprint())


def grid_note(comparison: Comparison) -> str:
    """What stands behind a grid's numbers, and what a grid of few seeds leaves open."""
    seeds, n = comparison.replies["seed"].nunique(), cell_size(comparison.replies)
    sizes = f"{slug(comparison.model)}: {n} requests a cell, trainings and draws of {seeds} seed{'s' * (seeds > 1)}."
    if seeds >= _ENOUGH:
        return sizes
    option = " --ablations" if comparison.ablated else ""
    return (
        f"{sizes} Too few to speak of the methods: the numbers are of these trainings. casa-mech compare{option} makes "
        "the grid with more; copy its folder summary to figures/compare, or give it as grid_tables."
    )


def changed_outcomes(comparison: Comparison, defenses: Sequence[str], reference: str = "none") -> pd.DataFrame:
    """Replies whose outcome differs from that of the model itself on the same query: `defense, label, changed, n`."""
    replies = comparison.replies
    itself = replies[replies["defense"] == reference]
    rows = []
    for defense in defenses:
        own = replies[replies["defense"] == defense]
        pairs = pairs_of(own, itself) if len(own) else own
        for label, of_label in pairs.groupby("label", sort=False):
            changed = int((of_label["outcome"] != of_label["outcome_other"]).sum())
            rows.append({"defense": defense, "label": label, "changed": changed, "n": len(of_label)})
    return pd.DataFrame(rows, columns=["defense", "label", "changed", "n"])


def cell_size(replies: pd.DataFrame) -> int:
    """Requests in the smallest cell of a grid."""
    return int(replies.groupby(["defense", "attack", "label", "seed"]).size().min())


def defense_grid(study: Study, n: int = 0, tables: str = "") -> Comparison:
    """The comparison of notebook 05: the committed one of the model (`committed_grid`), else one filled now.

    CASA is the study's own gate where the grid has no other seed or number of steps; all rows are trained as it is.
    `n` takes the place of the profile's number of requests in each cell.
    """
    committed = committed_grid(study, "compare", tables, n)
    if committed is not None:
        return committed
    sizes = sizes_for(study, DEFENSE_SIZES[study.settings.profile])
    steps = sizes.steps or study.sizes.train_steps
    batch = study.sizes.train_batch
    plan = TrainingPlan(
        study.sizes.train_examples,
        {"max_steps": steps, "batch_size": batch, "micro_batch_size": min(32, batch)},
        drawn=drawn_examples(study),
    )
    systems = [_in_a_study(system_named(name), study) for name in sizes.defenses]
    if sizes.seeds == 1 and sizes.steps is None:
        study.casa()
        gate = str(study.folder.path("gates", slug(study.settings.model)))
        systems = [
            system.model_copy(update={"path": gate}) if system.defense == REFERENCE and not system.training else system
            for system in systems
        ]
    return filled_grid(study, systems, sizes, plan, n)


def sizes_for(study: Study, sizes: GridSizes) -> GridSizes:
    """The sizes of a grid for the study's plan: of another than the micro-world its own columns and numbers, and the
    rows that need no queries beside them (to choose a weight on, or as prototypes) and no harmful completions."""
    if study.data.micro_world:
        return sizes
    rows = tuple(name for name in sizes.defenses if system_named(name).defense not in _NEEDS_MORE)
    return replace(sizes, n=study.sizes.n_eval, attacks=study.benign_attacks, defenses=rows)


def drawn_examples(study: Study) -> Callable[[int, int], list[Example]] | None:
    """Where the training examples of a grid come from; None: the micro-world."""
    if study.data.micro_world:
        return None
    return lambda n, seed: study.data.training_examples(n, seed, study.own_replies)


def _in_a_study(system: ComparedSystem, study: Study) -> ComparedSystem:
    """The row with circuit breakers trained for the published steps alone: those after them cost minutes."""
    if system.defense != "circuit-breaker" or study.settings.profile != "default":
        return system
    return system.model_copy(
        update={"training": {"max_steps": CircuitBreakerSettings().schedule_steps} | system.training}
    )


def filled_grid(
    study: Study,
    systems: Sequence[ComparedSystem],
    sizes: GridSizes,
    plan: TrainingPlan,
    n: int,
    ablated: Sequence[Variant] = (),
) -> Comparison:
    """A grid, filled in the study's run folder, with its tables.

    Args:
        study: whose model, folder and sizes of generation are used.
        systems: the rows.
        sizes: of the grid.
        plan: how rows are trained.
        n: requests in each cell; 0: those of `sizes`.
        ablated: the variants behind `systems`, for a grid of ablations.
    """
    study.omni()  # written down for the manifest
    settings = study.settings
    size = n or sizes.n
    sets: QuerySets = (
        WorldSets(sizes.attacks, size) if study.data.micro_world else PlanSets(study.data, sizes.attacks, size)
    )
    # A model of the grid's own: the study's may carry the gate.
    grid = Grid(
        study.new_omni(), systems, sets,
        range(settings.seed, settings.seed + sizes.seeds), study.folder, Weights(plan, study.folder, study.progress),
        generation=GenerationSettings(max_new_tokens=study.sizes.max_new_tokens, batch_size=study.sizes.batch_size),
        judge=study.judge(), rounds=sizes.rounds, progress=study.progress,
    )  # fmt: skip
    return Comparison.of(settings.model, study.omni().fingerprint(), grid.fill(), ablated)


def grid_data(summary: pd.DataFrame) -> pd.DataFrame:
    """Attack success and benign counterparts answered, by attack and over all, with `merit.NOT_REFUSED` beside."""
    summary = with_not_refused(summary)
    rates = summary["metric"].isin(["attack_success", "benign_answered"])
    of_surface = summary["scope"].str.startswith("surface:")
    return summary[rates & ~of_surface].reset_index(drop=True)


def tradeoff_data(summary: pd.DataFrame) -> pd.DataFrame:
    """Attack success, benign counterparts answered and cost over all attacks: a row a defence.

    `merit.NOT_REFUSED` stands beside attack success, and `failed`, the share of the seeds whose training missed its own
    criterion.
    """
    rows = []
    summary = with_not_refused(summary)
    for defense, metrics in summary[summary["scope"] == ALL].groupby("defense", sort=False):
        by_metric = metrics.set_index("metric")
        row = {"defense": defense, "n": int(by_metric.loc["attack_success", "n"])}
        for metric in ("attack_success", "benign_answered"):
            row |= {metric: by_metric.loc[metric, "value"], f"{metric}_low": by_metric.loc[metric, "low"]}
            row |= {f"{metric}_high": by_metric.loc[metric, "high"]}
        row |= {name: by_metric.loc["attack_success", name] for name in NOT_REFUSED}
        times, failed = (by_metric["value"].get(name, float("nan")) for name in ("relative_seconds", "training_failed"))
        row |= {"seeds": int(by_metric.loc["attack_success", "seeds"]), "failed": failed}
        rows.append({**row, "relative_seconds": times, "trained": by_metric.loc["trained_parameters", "value"]})
    return pd.DataFrame(rows)
