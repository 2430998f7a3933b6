"""`casa-mech run`, `doctor` and `bench`: the study, and the machine it runs on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from casa_mech.cli.app import app, note
from casa_mech.cli.checks import check_backend
from casa_mech.cli.options import Json, ModelOptions, Seed, command
from casa_mech.cli.printing import show
from casa_mech.errors import InputError, ModelError


@command(app, example="casa-mech run --profile smoke --out runs/first --only 02")
def run(
    profile: Annotated[str, typer.Option(help="smoke, default or full.")] = "default",
    only: Annotated[list[str] | None, typer.Option(help="Run this notebook only; repeatable.")] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="A notebook parameter, NAME=VALUE; repeatable.")
    ] = None,
    plan: Annotated[
        str,
        typer.Option(help="What it is about: world, english or a .yaml file [world for an organism, else english]."),
    ] = "",
    control: Annotated[str, typer.Option(help="Second model of the table [organism-split beside organism].")] = "",
    out: Annotated[Path | None, typer.Option(help="Run folder [runs/MODEL-PROFILE-seedN].")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Notebooks at a time [one a core for an organism, else one].")] = 0,
    seed: Seed = 0,
    as_json: Json = False,
    model: ModelOptions = ModelOptions(),
) -> None:
    """Run the notebooks: figures with their numbers, tables, pages and a manifest. A stopped run is continued."""
    from casa_mech.study.runner import run_study
    from casa_mech.study.settings import settings_of

    settings = settings_of(
        model=model.model,
        plan=plan,
        control=control,
        profile=profile,
        seed=seed,
        device=model.device,
        dtype=model.dtype,
    )
    parameters = dict(_pair(text) for text in param or ())
    check_backend()
    model.check()
    if control:
        _check_control(control)
    root = run_study(settings, out, only or (), parameters, arguments=sys.argv[1:], jobs=jobs)
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    result = {"out": str(root), "figures": _names(root, "figures/*.png"), "tables": _names(root, "tables/*.parquet")}
    show({**result, "seconds": manifest["timings"]["total"]}, as_json)


@command(app, example="casa-mech doctor --model Qwen/Qwen2.5-Omni-3B")
def doctor(as_json: Json = False, model: ModelOptions = ModelOptions()) -> None:
    """Say what is installed, what the machine has, and what would be loaded; exit status 2 if the model cannot be."""
    from casa_mech.study.doctor import examine

    report = examine(model.model, model.device, model.dtype)
    show(report, as_json)
    if (status := report["model"]["status"]).startswith("cannot be loaded"):
        note(f"the model {status}")
        raise typer.Exit(2)


@command(app, example="casa-mech bench --part gate --part lens --repeats 5")
def bench(
    part: Annotated[
        list[str] | None, typer.Option(help="gate, defenses, probes, lens, prefill or all; repeatable [gate].")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median is reported.")] = 5,
    as_json: Json = False,
    model: ModelOptions = ModelOptions(),
) -> None:
    """Measure speed ratios, both sides in one process: the gate, the defences, extraction and probes, the lens."""
    model.check()
    from casa_mech.timing.parts import measure_parts

    result = measure_parts(part or ["gate"], model.model, repeats, model.device, model.dtype)
    show(result if as_json else _readable(result), as_json)


def _readable(result: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark for a reader: all its ratios in one table, which names the two sides of each."""
    rest, ratios = _apart(result, "")
    return {**rest, "median seconds": ratios}


def _apart(result: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that is no ratio, as it is nested, and a row for each ratio, at any depth."""
    rest: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for key, value in result.items():
        if isinstance(value, Mapping) and "ratio" in value:
            row, more = _ratio_row(value, key)
            rows.append(row)
            rest |= {key: more} if more else {}
        elif isinstance(value, Mapping):
            within, ratios = _apart(value, key)
            rows += ratios
            rest |= {key: within} if within else {}
        elif isinstance(value, list) and value and all(isinstance(row, Mapping) and "ratio" in row for row in value):
            for entry in value:
                row, more = _ratio_row(entry, "")
                rows.append({**row, "measured": " ".join(map(str, [name, *more.values()])).strip()})
        else:
            rest[key] = value
    return rest, rows


def _ratio_row(measured: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """One ratio as a row (which sides, their seconds, ratio and the most allowed), and what else was measured."""
    sides = [key for key in measured if key.endswith("_seconds")]
    first, second = (key.removesuffix("_seconds") for key in sides)
    seconds = {"seconds": measured[sides[0]], "against": second, "its seconds": measured[sides[1]]}
    row = {"measured": name, "side": first, **seconds, "ratio": measured["ratio"], "allowed": measured.get("allowed")}
    rest = {key: value for key, value in measured.items() if key not in (*sides, "ratio", "allowed")}
    return row, rest


def _check_control(name: str) -> None:
    """Refuse a second model that is not there before the first one is trained; a hub id is downloaded now."""
    from casa_mech.omni.checkpoint import local_checkpoint

    try:
        if local_checkpoint(name) is None:
            from casa_mech.omni.load import find_checkpoint

            find_checkpoint(name)
    except ModelError as error:
        raise ModelError(f"--control: {error}") from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--param {text}: write NAME=VALUE, as in --param n_eval=100")
    return name, value


def _names(root: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in root.glob(pattern))
