"""`casa-mech attack` and `figstep`: attacked queries as files, and our pictures beside the published ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer

from casa_mech.cli.app import app, note
from casa_mech.cli.checks import check_backend, check_choice
from casa_mech.cli.options import Data, Json, ModelName, Seed, command
from casa_mech.cli.printing import show
from casa_mech.errors import InputError

_SNR = "Noise below the speech in dB: 20, 10:30 (drawn between), or none [20:40]."


@dataclass(frozen=True)
class AttackedOptions:
    """Which queries are attacked."""

    title: ClassVar[str] = "Queries"

    queries: Annotated[str, typer.Option(help="world, a benchmark (name or name:split), a table, a folder.")] = "world"
    n: Annotated[int | None, typer.Option(min=1, help="At most so many queries [world: 100].")] = None
    label: Annotated[
        str, typer.Option(help="harmful or benign: the world's of one kind; what unlabelled rows of a table are.")
    ] = ""
    column: Annotated[str | None, typer.Option(help="A table's column of prompts [prompt, where there is one].")] = None
    meta: Annotated[list[str] | None, typer.Option(help="KEY=COLUMN of a table, as topic=keyword; repeatable.")] = None
    data: Data = None


@dataclass(frozen=True)
class BenignOptions:
    """Their benign counterparts."""

    title: ClassVar[str] = "Benign counterparts"

    benign: Annotated[
        str, typer.Option(help="Benign queries, as --queries: one for each of them, rendered with the same draws.")
    ] = ""
    benign_column: Annotated[str | None, typer.Option(help="--column of --benign.")] = None
    benign_meta: Annotated[list[str] | None, typer.Option(help="--meta of --benign.")] = None


@dataclass(frozen=True)
class RenderingOptions:
    """How the attack is rendered."""

    title: ClassVar[str] = "Rendering"

    wrappers: Annotated[str, typer.Option(help="jailbreak: seen, held_out, all, or a .txt, .json, .csv file.")] = (
        "held_out"
    )
    voice: Annotated[str | None, typer.Option(help="Voice of clips [drawn for each query].")] = None
    speed: Annotated[int | None, typer.Option(help="Words a minute, 80-450 [drawn].")] = None
    pitch: Annotated[int | None, typer.Option(help="Pitch, 0-99 [drawn].")] = None
    snr: Annotated[str, typer.Option(help=_SNR)] = "20:40"
    picture: Annotated[Path | None, typer.Option(help="sd-typo: a picture, or a folder of them named by id.")] = None
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="figstep, aiah: published wording as text; aiah with {question}, letters {letters} [ours]."),
    ] = None
    model: ModelName = "organism"


@command(
    app,
    example="casa-mech attack figstep --queries safebench-tiny --data sets --benign figstep-benign --out fs   "
    "(then: casa-mech evaluate --queries fs --gate gate)",
)
def attack(
    name: Annotated[str, typer.Argument(help="The attack [none: list them].")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for index.parquet and the media.")] = None,
    skip_unfit: Annotated[
        bool, typer.Option("--skip-unfit", help="Leave out queries the attack does not fit.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    queries: AttackedOptions = AttackedOptions(),
    counterparts: BenignOptions = BenignOptions(),
    rendering: RenderingOptions = RenderingOptions(),
) -> None:
    """Render queries under an attack: PNG and WAV files and an index that evaluate reads. A stopped call continues.

    With --benign, a benign counterpart of each query is rendered the same way (same voice, wrapper, layout). --model is
    whose tokens a prefill counts (prefill-K for any K).
    """
    from casa_mech.attacks import Speech
    from casa_mech.attacks.registry import SUMMARIES

    if not name:
        show({"attacks": [{"name": known, "what": text} for known, text in SUMMARIES.items()]}, as_json)
        return
    if out is None:
        raise InputError(f"say where the files go: casa-mech attack {name} --out FOLDER")
    if queries.label:
        check_choice("--label", queries.label, ("harmful", "benign"))
    from casa_mech.evaluation.attack_files import AttackChoice, QueryChoice, write_attacked
    from casa_mech.queries import Label

    meta, benign_meta = _columns_of(queries.meta), _columns_of(counterparts.benign_meta)
    # With counterparts the micro-world's requests are the harmful ones.
    label = queries.label or ("harmful" if queries.queries == "world" and counterparts.benign else None)
    attacked = QueryChoice(queries.queries, queries.n, cast("Label | None", label), queries.column, meta, queries.data)
    benign = QueryChoice(counterparts.benign, None, "benign", counterparts.benign_column, benign_meta, queries.data)
    speech = Speech(name=rendering.voice, speed=rendering.speed, pitch=rendering.pitch, snr_db=_levels(rendering.snr))
    choice = AttackChoice(
        name, seed, rendering.wrappers, speech, rendering.picture, rendering.prompt_file, rendering.model, skip_unfit
    )
    summary = write_attacked(choice, attacked, out, benign if counterparts.benign else None, note, progress=True)
    show(summary, as_json)


@command(app, example="casa-mech figstep figstep-data --out figures/figstep_comparison")
def figstep(
    folder: Annotated[Path, typer.Argument(help="FigStep's table (SafeBench-Tiny.csv or safebench.csv) and pictures.")],
    out: Annotated[Path | None, typer.Option(help="Write PNG, SVG and CSV of this name.")] = None,
    as_json: Json = False,
) -> None:
    """Hold our FigStep pictures against the published ones: size, lines, shared ink."""
    check_backend()
    from casa_mech.reports.figstep import figstep_comparison, figstep_figure, figstep_summary

    table = figstep_comparison(folder)
    result: dict[str, Any] = {"folder": str(folder), "fonts": figstep_summary(table)}
    if out is not None:
        from casa_mech.figures import save_figure

        result["figure"] = str(save_figure(figstep_figure(table, folder), table, out))
    show(result, as_json)


def _columns_of(texts: list[str] | None) -> dict[str, str]:
    """`Query.meta` key -> column, from KEY=COLUMN. InputError for what is written otherwise."""
    pairs = dict(text.partition("=")[::2] for text in texts or ())
    for key, column in pairs.items():
        if not (key and column):
            raise InputError(f"--meta {key}: write it as KEY=COLUMN, such as topic=keyword")
    return pairs


def _levels(text: str) -> tuple[float, float] | None:
    """The least and the most decibels that --snr means; None for no noise. InputError for what is no number."""
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
