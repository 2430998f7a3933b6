"""`casa-mech run`, `doctor` and `bench`: the study, and the machine it runs on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from casa_mech.cli.app import Device, Dtype, Json, Model, Seed, app, show
from casa_mech.errors import InputError


@app.command(epilog="Example:  casa-mech run --profile smoke --out runs/first --only 02")
def run(
    model: Model = "organism",
    control: Annotated[str, typer.Option(help="Second model of the table [organism-split beside organism].")] = "",
    profile: Annotated[str, typer.Option(help="smoke, default or full.")] = "default",
    only: Annotated[list[str] | None, typer.Option(help="Run this notebook only (may be repeated).")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [runs/MODEL-PROFILE-seedN].")] = None,
    seed: Seed = 0,
    param: Annotated[list[str] | None, typer.Option("--param", "-p", help="A notebook parameter, NAME=VALUE.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Notebooks at a time [one a core for an organism, else one].")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Run the notebooks: figures with their numbers, tables, pages and a manifest. A stopped run is continued."""
    from casa_mech.study.runner import run_study
    from casa_mech.study.settings import settings_of

    settings = settings_of(model=model, control=control, profile=profile, seed=seed, device=device, dtype=dtype)
    parameters = dict(_pair(text) for text in param or ())
    root = run_study(settings, out, only or (), parameters, arguments=sys.argv[1:], jobs=jobs)
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    result = {"out": str(root), "figures": _names(root, "figures/*.png"), "tables": _names(root, "tables/*.parquet")}
    show({**result, "seconds": manifest["timings"]["total"]}, as_json)


@app.command(epilog="Example:  casa-mech doctor --model Qwen/Qwen2.5-Omni-3B")
def doctor(model: Model = "organism", device: Device = "auto", dtype: Dtype = "auto", as_json: Json = False) -> None:
    """Say what is installed, what the machine has, and what would be loaded."""
    from casa_mech.study.doctor import examine

    show(examine(model, device, dtype), as_json)


@app.command(epilog="Example:  casa-mech bench --part gate --part lens --repeats 5 --json")
def bench(
    model: Model = "organism",
    part: Annotated[
        list[str] | None, typer.Option(help="gate, defenses, probes, lens, prefill or all (may be repeated) [gate].")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median is reported.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed ratios, both sides in one process: the gate, the defences, extraction and probes, the lens."""
    from casa_mech.timing.parts import measure_parts

    show(measure_parts(part or ["gate"], model, repeats, device, dtype), as_json)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--param {text}: write NAME=VALUE, as in --param n_eval=100")
    return name, value


def _names(root: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in root.glob(pattern))
