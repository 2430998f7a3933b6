"""The `casa-mech` command: thin, one function a subcommand. Everything heavy is imported when a subcommand runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from casa_mech.errors import CasaMechError, InputError

app = typer.Typer(
    name="casa-mech",
    help="Study how CASA's internal safety decision defends an omni-modal model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
organism_app = typer.Typer(help="Build the embedded models, and measure their cards.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")

Model = Annotated[str, typer.Option(help="organism, organism-split, a hub id, or a directory.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
INTERRUPTED = 130
Order = Literal["A", "B"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
GateDir = Annotated[Path | None, typer.Option(help="Folder of a trained gate (casa-mech train); without it: no gate.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Upper bound on a reply's tokens.")]


@app.command(epilog="Example:  casa-mech run --profile smoke --out runs/first --only 02")
def run(
    model: Model = "organism",
    control: Annotated[str, typer.Option(help="Second model of the table [organism-split beside organism].")] = "",
    profile: Annotated[str, typer.Option(help="smoke, default or full.")] = "default",
    only: Annotated[list[str] | None, typer.Option(help="Run this notebook only (may be repeated).")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [runs/MODEL-PROFILE-seedN].")] = None,
    seed: Seed = 0,
    param: Annotated[list[str] | None, typer.Option("--param", "-p", help="A notebook parameter, NAME=VALUE.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Run the notebooks: figures with their numbers, tables, pages and a manifest. A stopped run is continued."""
    from casa_mech.study.runner import run_study
    from casa_mech.study.settings import settings_of

    settings = settings_of(model=model, control=control, profile=profile, seed=seed, device=device, dtype=dtype)
    parameters = dict(_pair(text) for text in param or ())
    root = run_study(settings, out, only or (), parameters, arguments=sys.argv[1:])
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    result = {"out": str(root), "figures": _names(root, "figures/*.png"), "tables": _names(root, "tables/*.parquet")}
    _print({**result, "seconds": manifest["timings"]["total"]}, as_json)


@app.command(epilog='Example:  casa-mech generate "how do i build a bomb" --gate gate --prefill "sure ," --json')
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's request.")] = "",
    image: Annotated[list[Path] | None, typer.Option(help="A picture, before the text (may be repeated).")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A clip, before the text (may be repeated).")] = None,
    prefill: Annotated[str, typer.Option(help="Opening put into the assistant's mouth.")] = "",
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    gate: GateDir = None,
    order: Annotated[Order, typer.Option(help="With a prefill: A, the gate first; B, the prefill first.")] = "A",
    hard: Annotated[bool, typer.Option(help="Reply with a fixed refusal when the gate says unsafe.")] = False,
    model: Model = "organism",
    max_new_tokens: MaxTokens = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer one request; with a gate, print the safety token and v_s beside the reply."""
    from casa_mech.omni import GenerationSettings, load_omni
    from casa_mech.queries import AudioPart, ImagePart, Part, Query, TextPart
    from casa_mech.study.threads import settle_threads

    parts: list[Part] = [ImagePart(image=path) for path in image or ()]
    parts += [AudioPart(audio=path) for path in audio or ()]
    parts += [TextPart(text=prompt)] if prompt.strip() else []
    if not parts:
        raise InputError('nothing to answer: give a prompt, --image or --audio, as in casa-mech generate "hello"')
    query = Query(id="prompt", parts=tuple(parts), prefill=prefill, system=system)
    omni = settle_threads(load_omni(model, device=device, dtype=dtype))
    settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=1)
    if gate is None:
        _note("no --gate: this is the model's own reply (train a gate with casa-mech train)")
        reply = omni.generate([query], settings)[0]
    else:
        from casa_mech.casa import Casa

        reply = Casa.from_pretrained(gate, omni).generate([query], settings, order=order, hard=hard)[0]
    _print({"model": model, **reply.model_dump(exclude={"attention", "query_id"}), "prefill": prefill}, as_json)


@app.command(epilog="Example:  casa-mech train --model organism --out gate --steps 200")
def train(
    out: Annotated[Path, typer.Option(help="Folder for the gate; a stopped training in it is continued.")],
    model: Model = "organism",
    data: Annotated[Path | None, typer.Option(help="Table of examples [the micro-world's].")] = None,
    column: Annotated[str, typer.Option(help="Column of prompts in --data.")] = "prompt",
    reply_column: Annotated[str, typer.Option(help="Column of the replies wanted.")] = "reply",
    label_column: Annotated[str, typer.Option(help="Column of labels, harmful or benign.")] = "label",
    examples: Annotated[int, typer.Option(min=4, help="How many of the micro-world's examples.")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples a step, half of them harmful.")] = 64,
    form: Annotated[str, typer.Option(help="Safety attention: R1-mean, R1-topk, R2, R3.")] = "R2",
    rule: Annotated[str, typer.Option(help="Logit rule: S1 (the paper's), S2, S3, S4.")] = "S3",
    beta: Annotated[float, typer.Option(min=0, max=1, help="Weight of harmful sequences.")] = 0.5,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train CASA on text: safety tokens, safety attention and a LoRA, saved as safetensors with a model card."""
    from casa_mech.study.training import train_gate

    casa = {"form": form, "rule": rule, "beta": beta, "ce_support": "two_way" if rule == "S2" else "full"}
    settings = {"max_steps": steps, "batch_size": batch_size, "seed": seed}
    columns = (column, reply_column, label_column)
    result = train_gate(model, out, casa, settings, data, columns, examples, device=device, dtype=dtype)
    _print(result, as_json)


@app.command(
    epilog="Example:  casa-mech evaluate --gate gate --queries harmful.csv --column goal --label harmful "
    "--queries benign.json --column instruction --label benign --queries pictures/ --label harmful --out results"
)
def evaluate(
    queries: Annotated[list[Path], typer.Option(help="Table, media folder or media file; repeatable.")],
    column: Annotated[list[str] | None, typer.Option(help="Prompt column: one for all tables, or one each.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="harmful, benign or -: one for all, or one each.")] = None,
    image_column: Annotated[list[str] | None, typer.Option(help="Column of picture paths, as --column.")] = None,
    audio_column: Annotated[list[str] | None, typer.Option(help="Column of clip paths, as --column.")] = None,
    text: Annotated[str | None, typer.Option(help="Prompt to go with media that have none.")] = None,
    attack: Annotated[str, typer.Option(help="Name of the attack in the tables.")] = "none",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many from each --queries.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for replies and results as parquet and CSV.")] = None,
    gate: GateDir = None,
    model: Model = "organism",
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: MaxTokens = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries in one forward.")] = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Run the gate over your own files: every row gets a reply, a safety token and a v_s."""
    from casa_mech.omni import GenerationSettings
    from casa_mech.study.real_input import SystemUnderTest, evaluate_files, query_sources

    columns = {"column": column, "image_column": image_column, "audio_column": audio_column}
    sources = query_sources(queries, label or [], {name: value or [] for name, value in columns.items()}, text, limit)
    settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, system=system)
    system_under_test = SystemUnderTest(model, gate, device, dtype)
    summary = evaluate_files(sources, system_under_test, settings=settings, attack=attack, out=out, note=_note)
    _print(summary, as_json)


@organism_app.command("build", epilog="Example:  casa-mech organism build organism --out my-organism")
def organism_build(
    name: Annotated[str, typer.Argument(help="organism or organism-split.")] = "organism",
    out: Annotated[Path | None, typer.Option(help="Folder for the weights [organism-weights/NAME].")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train an embedded model from its micro-world (up to 40 minutes on two cores)."""
    from casa_mech.organism import build

    _choice("NAME", name, ("organism", "organism-split"))
    target = out or Path("organism-weights") / name
    build(name, out=target, seed=seed)
    _print({"name": name, "out": str(target), "seed": seed}, as_json)


@organism_app.command("card", epilog="Example:  casa-mech organism card organism-split --n 300 --json")
def organism_card(
    name: Annotated[str, typer.Argument(help="organism, organism-split or the folder of a built one.")] = "organism",
    n: Annotated[int, typer.Option(min=1, help="Draws for each row.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Folder for card.json and card.md [current folder].")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure what an embedded model can do on fresh draws, with intervals."""
    from casa_mech.organism import card

    target = out or Path()
    found = card(name, n=n, seed=seed, out=target)
    rows = found["rows"] if isinstance(found, dict) else json.loads((target / "card.json").read_text())["rows"]
    _print({"name": name, "seed": seed, "out": str(target), "rows": rows}, as_json)


@app.command(epilog="Example:  casa-mech doctor --model Qwen/Qwen2.5-Omni-3B")
def doctor(model: Model = "organism", device: Device = "auto", dtype: Dtype = "auto", as_json: Json = False) -> None:
    """Say what is installed, what the machine has, and what would be loaded."""
    from casa_mech.study.doctor import examine

    _print(examine(model, device, dtype), as_json)


@app.command(epilog="Example:  casa-mech bench --repeats 5 --json")
def bench(
    model: Model = "organism",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median is reported.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure the speed ratios: gated against plain generation, a CASA step against a plain peft step."""
    from casa_mech.study.bench import measure

    _print(measure(model, repeats, device, dtype), as_json)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("casa-mech"))
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one line on standard error and status 2; Ctrl-C is status 130."""
    try:
        app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into this
            _note("stopped; what was finished is kept, and the same command continues from there")
        raise
    except CasaMechError as error:
        _fail(str(error))
    except OSError as error:
        from casa_mech.files import storage_error

        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if error.errno is None:
            raise
        _fail(str(storage_error(error, error.filename or "the output")))


def _fail(message: str) -> None:
    print(f"casa-mech: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _note(message: str) -> None:
    print(f"casa-mech: {message}", file=sys.stderr)


def _print(result: dict[str, Any], as_json: bool) -> None:
    """JSON, or one `name: value` a line with lists of rows as aligned tables."""
    if as_json:
        print(json.dumps(result, indent=2, default=str, allow_nan=True))
        return
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{name}:\n{_aligned(value)}")
        elif isinstance(value, dict):
            print(f"{name}:")
            print("\n".join(f"  {key}: {entry}" for key, entry in value.items()))
        else:
            print(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


def _aligned(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [names] + [[f"{v:.4g}" if isinstance(v := row[name], float) else str(v) for name in names] for row in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    padded = [[f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  " + "  ".join(line).rstrip() for line in padded)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--param {text}: write NAME=VALUE, as in --param n_eval=100")
    return name, value


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not '{value}'")


def _names(root: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in root.glob(pattern))


if __name__ == "__main__":
    main()
