"""The `casa-mech` application: its options, and how results are printed. Subcommands register themselves on `app`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from casa_mech.errors import InputError

if TYPE_CHECKING:
    from casa_mech.judging import Judge

app = typer.Typer(
    name="casa-mech",
    help="Study how CASA's internal safety decision defends an omni-modal model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
organism_app = typer.Typer(help="Build the embedded models, and measure their cards.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")

Model = Annotated[str, typer.Option(help="organism, organism-split, a hub id, or a directory.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
INTERRUPTED = 130
Order = Literal["gate_first", "prefill_first"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
GateDir = Annotated[Path | None, typer.Option(help="Folder of a trained gate (casa-mech train); without it: no gate.")]
Options = Annotated[list[str] | None, typer.Option(help="Option of the defence, NAME=VALUE; repeatable.")]
Data = Annotated[Path | None, typer.Option(help="Folder with the benchmarks [the one CASA_MECH_DATA names].")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Upper bound on a reply's tokens.")]

JudgeName = Annotated[str, typer.Option(help="micro-world, keyword, classifier, yes-no, strong-reject, five-point, "
                                             "refusal, or a rubric's .json file.")]  # fmt: skip
Backend = Annotated[str, typer.Option(help="Of rubrics: local, openai (and compatible) or anthropic.")]
JudgeModel = Annotated[str, typer.Option(help="The judging model: hub id, directory, or the API's name.")]
BaseUrl = Annotated[str, typer.Option(help="Address of the judge's API, https://host/v1 [the vendor's].")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable of the judge's key [the vendor's usual one].")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests to the judge at a time.")]
Tries = Annotated[int, typer.Option(min=1, help="Requests for one reply before the judge counts as down.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds without an answer from the judge.")]
InputPrice = Annotated[float | None, typer.Option(help="Dollars for a million of the judge's input tokens.")]
OutputPrice = Annotated[float | None, typer.Option(help="Dollars for a million of its output tokens.")]
Positive = Annotated[list[str] | None, typer.Option(help="A classifier's label that means success.")]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="A classifier's least probability.")]
_JUDGE_OPTIONS = (
    "threshold", "device", "dtype", "batch_size", "base_url", "key_env", "concurrency", "tries", "timeout",
    "input_price", "output_price",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("casa-mech"))
        raise typer.Exit


def note(message: str) -> None:
    """A line for the user on standard error; standard output is for results."""
    print(f"casa-mech: {message}", file=sys.stderr)


def show(result: dict[str, Any], as_json: bool) -> None:
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


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs as a dict; a value is read as JSON where it is JSON, else as text.

    Raises:
        InputError: a pair without a name or an equals sign.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"--option {pair}: write it as NAME=VALUE")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = value
    return found


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """InputError, listing the choices, unless `value` is one of them."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not '{value}'")


def chosen_judge(parameters: Mapping[str, Any]) -> Judge:
    """The judge that a subcommand's parameters (`context.params`) describe: `JudgeName` and the options after it.

    Raises:
        InputError, ModelError: as `load_judge`.
    """
    from casa_mech.judging import load_judge

    options = {name: parameters[name] for name in _JUDGE_OPTIONS}
    positive = parameters["positive"] or ()
    return load_judge(
        parameters["judge"], parameters["backend"], parameters["judge_model"], positive=positive, **options
    )
