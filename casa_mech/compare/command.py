"""`casa-mech compare`: a grid from the command line, in a folder of its own that grows from call to call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from casa_mech.compare.ablations import ABLATION_SEEDS, AXES, Variant, systems_of, variants
from casa_mech.compare.benchmark_sets import BenchmarkSets
from casa_mech.compare.comparison import Comparison, write_comparison
from casa_mech.compare.config import CompareConfig, read_config
from casa_mech.compare.grid import GENERATION, ROUNDS, Grid, GridResult
from casa_mech.compare.sets import DEFAULT_ATTACKS, QuerySets, WorldSets
from casa_mech.compare.systems import DEFAULT_DEFENSES, SEEDS, ComparedSystem, check_systems, system_named
from casa_mech.compare.tables import compact
from casa_mech.compare.weights import TrainingPlan, Weights
from casa_mech.errors import InputError, RunError
from casa_mech.files import check_folder, reading_error, write_text, writing
from casa_mech.judging import Judge, load_judge
from casa_mech.judging.published import NOT_MEASURED, published_checks, published_means, published_rates
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.study.folder import RunFolder
from casa_mech.study.settings import CLONE, slug

_MARKER, _SCHEMA = "compare.json", 1
_PARTS = ("alpha", "systems", "training", "trained", "cells", "timings", "work", "summary", "figures")
"""What a comparison keeps in its folder."""

Draw = Callable[[Comparison, RunFolder, str], Sequence[Path]]
"""Draws a comparison into a folder under a name and returns the pictures' paths."""


@dataclass(frozen=True)
class Request:
    """A comparison as the command line asks for it. Empty lists and None stand for the defaults, or for what the
    configuration says."""

    model: str = "organism"
    """As for `load_omni`."""
    defenses: Sequence[str] = ()
    """The rows by name, as `systems.system_named` reads them."""
    attacks: Sequence[str] = ()
    """The columns by name; a configuration has its own."""
    seeds: Sequence[int] = ()
    """Of training and draws."""
    n: int | None = None
    """Requests in each cell; a configuration has its own limits."""
    config: Path | None = None
    """A YAML file (see `config.CompareConfig`)."""
    ablations: bool = False
    """The second grid: CASA with one thing changed at a time."""
    axes: Sequence[str] = ()
    """Of the second grid; empty: all."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options that all supervised trainings share, `n_examples` and `benign`."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `GenerationSettings`."""
    rounds: int | None = None
    """Of timing; 0 for none."""
    device: str = "auto"
    """As for `load_omni`."""
    dtype: str = "auto"
    """As for `load_omni`."""


def compare(
    request: Request,
    out: Path | None = None,
    progress: bool = True,
    note: Callable[[str], None] = print,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Fill a grid, write its tables and draw it; the same call after a stop goes on, another one adds to the folder.

    Args:
        request: what to compare; all that can be checked without a model is checked before one is loaded.
        out: the folder; None: `runs/compare-<model>`.
        progress: whether to draw bars.
        note: called with what was left out, one line each.
        draw: draws the tables into the folder (`casa_mech.reports.comparison.draw`); None: no figures.

    Returns:
        Where the tables and figures are, how many cells were computed and how many were there, the summary, the tests
        and the published numbers.

    Raises:
        InputError: a name, option, file or query that cannot be used. RunError: a folder or judge that cannot.
    """
    began = time.perf_counter()
    config = read_config(request.config) if request.config is not None else None
    _check(request, config)
    systems, sets, plan = _systems(request, config), _sets(request, config, note), _plan(request, config)
    if not request.ablations:
        check_systems(systems)
    folder = open_folder(out or _default_folder(request.model))
    with folder.locked():
        omni = load_omni(request.model, device=request.device, dtype=request.dtype)
        seeds = _seeds(request, config)
        _warn(request, config, omni, sets, seeds[0], note)
        levels: list[Variant] = []
        if request.ablations:
            levels = variants(omni.n_layers, plan.n_examples, request.axes or AXES)
            systems = systems_of(levels)
        rounds = request.rounds if request.rounds is not None else config.timing_rounds if config else ROUNDS
        grid = Grid(
            omni, systems, sets, seeds, folder, Weights(plan, folder, progress),
            generation=_generation(request, config), judge=_judge(request, config),
            rounds=0 if request.ablations else rounds, progress=progress,
        )  # fmt: skip
        note(_amount(grid))
        result = grid.fill()
        comparison = Comparison.of(request.model, omni.fingerprint(), result, levels)
        name = f"{'ablations' if request.ablations else 'compare'}-{slug(request.model)}"
        figures = draw(comparison, folder, name) if draw else []
        write_comparison(comparison, folder.path("summary"), name)
        with writing(folder.path("summary", f"{name}-published.csv")) as temporary:
            published_rates().to_csv(temporary, index=False)
    return {
        "model": request.model,
        "out": str(folder.root),
        "figures": [str(path) for path in figures],
        **_report(result, comparison, grid.seeds),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _amount(grid: Grid) -> str:
    """How much there is to do, said before hours of work; the bar then says how long it takes."""
    cells = len(grid.sets.cells()) * len(grid.systems) * len(grid.seeds)
    trainings = sum(system.trains for system in grid.systems) * len(grid.seeds)
    return (
        f"{cells} cells and {trainings} trainings, less what {grid.folder.root} holds already: the bar says how long "
        "they take, and a stopped call goes on"
    )


def open_folder(path: Path) -> RunFolder:
    """The folder of a comparison: new, empty, or with an earlier comparison, of whatever defences, models and sizes.

    Raises:
        RunError: it holds something else (also beside a marker that is cut off), was written by another release, or
            cannot be written to.
    """
    root = path.absolute()
    marker = root / _MARKER
    check_folder(root, [".*"], _MARKER, create=True)
    version = _version(marker)
    if version is None:  # new, or cut off: what lies beside it says itself what it was made from
        if marker.exists():
            check_folder(root, [".*", _MARKER, *_PARTS])
        write_text(marker, json.dumps({"schema_version": _SCHEMA}) + "\n")
    elif version != _SCHEMA:
        raise RunError(f"{marker} has schema version {version}, this release writes {_SCHEMA}: choose another --out")
    return RunFolder(root)


def _version(marker: Path) -> Any:
    """The schema version that a comparison's marker names; None where it is not there, or holds no such thing."""
    try:
        return json.loads(marker.read_text(encoding="utf-8"))["schema_version"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise reading_error(error, marker) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _default_folder(model: str) -> Path:
    here = Path.cwd()
    return (CLONE if here.is_relative_to(CLONE) else here) / "runs" / f"compare-{slug(model)}"


def _check(request: Request, config: CompareConfig | None) -> None:
    if config is not None and (request.attacks or request.n is not None):
        raise InputError("--attacks and --n are for the micro-world; --queries-config names its own sets and limits")
    if request.ablations and request.defenses:
        raise InputError("--ablations has rows of its own: leave out --defenses")
    if request.axes:
        variants(1, 8, request.axes)  # names the known ones


def _systems(request: Request, config: CompareConfig | None) -> list[ComparedSystem]:
    if request.defenses:
        return [system_named(name) for name in request.defenses]
    if config is not None and config.defenses:
        return list(config.defenses)
    return [system_named(name) for name in DEFAULT_DEFENSES]


def _sets(request: Request, config: CompareConfig | None, note: Callable[[str], None]) -> QuerySets:
    if config is not None:
        return BenchmarkSets(config, note)
    return WorldSets(tuple(request.attacks) or DEFAULT_ATTACKS, 200 if request.n is None else request.n)


def _seeds(request: Request, config: CompareConfig | None) -> tuple[int, ...]:
    return tuple(request.seeds) or (config.seeds if config else ABLATION_SEEDS if request.ablations else SEEDS)


def _plan(request: Request, config: CompareConfig | None) -> TrainingPlan:
    base = TrainingPlan()
    settings = dict(request.training)
    n_examples, section = int(settings.pop("n_examples", base.n_examples)), config.training if config else None
    benign = settings.pop("benign", section.benign if section else base.benign)
    if section is None:
        return TrainingPlan(n_examples, {**base.settings, **settings}, benign=benign)
    own = section.settings if section.examples else {**base.settings, **section.settings}
    plan = TrainingPlan(n_examples, {**own, **settings}, section.examples, benign)
    return replace(plan, n_examples=len(plan.examples(0))) if section.examples else plan


def _generation(request: Request, config: CompareConfig | None) -> GenerationSettings:
    base = config.generation if config else GENERATION
    return GenerationSettings.model_validate({**base.model_dump(), **request.generation})


def _judge(request: Request, config: CompareConfig | None) -> Judge | None:
    if config is None:
        return None
    plan = config.judge
    return load_judge(
        plan.name, plan.backend, plan.model, **{"device": request.device, "dtype": request.dtype, **plan.options}
    )


def _warn(
    request: Request,
    config: CompareConfig | None,
    omni: Omni,
    sets: QuerySets,
    seed: int,
    note: Callable[[str], None],
) -> None:
    if config is None:
        return
    cell = sets.cells()[0]
    unknown = omni.unknown_share([query.text for query in sets.queries(cell, seed, omni) if query.text])
    if unknown > 0 and omni.speaks_micro_world:
        note(
            f"warning: {unknown:.0%} of the words of {cell.attack} are unknown to {request.model}, which speaks a "
            "micro-world's English only: its rates say nothing beyond that the sets can be run"
        )


def _report(result: GridResult, comparison: Comparison, seeds: Sequence[int]) -> dict[str, Any]:
    """A filled grid in a few rows, beside what was published."""
    summary, tests = comparison.summary, comparison.tests
    chosen = comparison.curves[comparison.curves["chosen"].astype(bool)].drop_duplicates("defense")
    return {
        "cells": {"computed": result.computed, "found": result.reused},
        "n_cell": int(result.replies.groupby(["defense", "attack", "label", "seed"]).size().min()),
        "seeds": list(seeds),
        "judge": str(result.replies["judge"].iloc[0]),
        "defenses": compact(summary.drop_duplicates(["defense", "metric", "scope"])).to_dict("records"),
        "alpha": dict(zip(chosen["defense"], chosen["alpha"].astype(float), strict=True)),
        "against_casa": tests[tests["scope"] == "all"].to_dict("records"),
        "published": {
            "note": NOT_MEASURED,
            "means": published_means().to_dict("records"),
            "checks": published_checks().to_dict("records"),
        },
    }
