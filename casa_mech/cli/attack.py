"""`casa-mech attack` and `figstep`: attacked queries as files, and our pictures beside the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from casa_mech.cli.app import Data, Json, Model, Seed, app, check_choice, note, show
from casa_mech.errors import InputError

_SNR = "Noise below the speech in dB: 20, 10:30 (drawn between), or none [20:40]."


@app.command(
    epilog="Example:  casa-mech attack figstep --queries safebench-tiny --data sets --twins figstep-benign --out fs   "
    "(then: casa-mech evaluate --queries fs --gate gate)"
)
def attack(
    name: Annotated[str, typer.Argument(help="The attack [none: list them].")] = "",
    queries: Annotated[str, typer.Option(help="world, a benchmark (name or name:split), a table, a folder.")] = "world",
    out: Annotated[Path | None, typer.Option(help="Folder for index.parquet and the media.")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="At most so many queries [world: 100].")] = None,
    label: Annotated[str, typer.Option(help="harmful or benign: the world's of one kind; what a table holds.")] = "",
    column: Annotated[str | None, typer.Option(help="A table's column of prompts.")] = None,
    meta: Annotated[list[str] | None, typer.Option(help="KEY=COLUMN of a table, as topic=keyword; repeatable.")] = None,
    data: Data = None,
    twins: Annotated[str, typer.Option(help="Benign queries, as --queries: one for each, with the same draws.")] = "",
    twins_column: Annotated[str | None, typer.Option(help="--column of --twins.")] = None,
    twins_meta: Annotated[list[str] | None, typer.Option(help="--meta of --twins.")] = None,
    wrappers: Annotated[
        str, typer.Option(help="jailbreak: seen, held_out, all, or a .txt, .json, .csv file.")
    ] = "held_out",
    voice: Annotated[str | None, typer.Option(help="Voice of clips [drawn for each query].")] = None,
    speed: Annotated[int | None, typer.Option(help="Words a minute, 80-450 [drawn].")] = None,
    pitch: Annotated[int | None, typer.Option(help="Pitch, 0-99 [drawn].")] = None,
    snr: Annotated[str, typer.Option(help=_SNR)] = "20:40",
    picture: Annotated[Path | None, typer.Option(help="sd-typo: a picture, or a folder of them named by id.")] = None,
    skip_unfit: Annotated[
        bool, typer.Option("--skip-unfit", help="Leave out queries the attack does not fit.")
    ] = False,
    model: Model = "organism",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Render queries under an attack: PNG and WAV files and an index that evaluate reads. A stopped call continues.

    With --twins, each query's benign twin is rendered the same way (same voice, wrapper, layout). --model is whose
    tokens a prefill counts (prefill-K for any K).
    """
    from casa_mech.attacks import Speech
    from casa_mech.attacks.registry import SUMMARIES

    if not name:
        show({"attacks": [{"name": known, "what": text} for known, text in SUMMARIES.items()]}, as_json)
        return
    if out is None:
        raise InputError(f"say where the files go: casa-mech attack {name} --out FOLDER")
    if label:
        check_choice("--label", label, ("harmful", "benign"))
    from casa_mech.evaluation.attack_files import AttackChoice, QueryChoice, write_attacked
    from casa_mech.queries import Label

    chosen = QueryChoice(queries, n, cast("Label | None", label or None), column, _pairs(meta), data)
    benign = QueryChoice(twins, None, "benign", twins_column, _pairs(twins_meta), data) if twins else None
    if queries == "world" and benign and not label:
        chosen = QueryChoice(queries, n, "harmful")
    speech = Speech(name=voice, speed=speed, pitch=pitch, snr_db=_levels(snr))
    options = AttackChoice(name, seed, wrappers, speech, picture, model, skip_unfit)
    show(write_attacked(options, chosen, out, benign, note, progress=True), as_json)


@app.command(epilog="Example:  casa-mech figstep figstep-data --out figures/figstep_comparison")
def figstep(
    folder: Annotated[Path, typer.Argument(help="FigStep's table (SafeBench-Tiny.csv or safebench.csv) and pictures.")],
    out: Annotated[Path | None, typer.Option(help="Write PNG, SVG and CSV of this name.")] = None,
    as_json: Json = False,
) -> None:
    """Hold our FigStep pictures against the published ones: size, lines, shared ink."""
    from casa_mech.reports.figstep import figstep_comparison, figstep_figure, figstep_summary

    table = figstep_comparison(folder)
    result: dict[str, Any] = {"folder": str(folder), "fonts": figstep_summary(table)}
    if out is not None:
        from casa_mech.figures import save_figure

        result["figure"] = str(save_figure(figstep_figure(table, folder), table, out))
    show(result, as_json)


def _pairs(texts: list[str] | None) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in texts or ())
    for key, column in pairs.items():
        if not (key and column):
            raise InputError(f"--meta {key}: write it as KEY=COLUMN, such as topic=keyword")
    return pairs


def _levels(text: str) -> tuple[float, float] | None:
    if text == "none":
        return None
    first, _, second = text.partition(":")
    try:
        low, high = float(first), float(second or first)
    except ValueError:
        raise InputError(f"--snr {text}: give decibels (20), bounds (10:30) or none") from None
    if not -50 <= low <= high <= 200:
        raise InputError(f"--snr {text}: bounds in decibels, the lower first, within -50 and 200")
    return low, high
