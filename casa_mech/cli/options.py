"""The options that subcommands share, as records of a few each; `command` turns a record into one option a field."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from casa_mech.errors import InputError
from casa_mech.limits import GREATEST_SEED

if TYPE_CHECKING:
    from casa_mech.judging import Judge
    from casa_mech.queries import LoadedQueries

Seed = Annotated[int, typer.Option(min=0, max=GREATEST_SEED, help="Seed of every draw.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
Data = Annotated[Path | None, typer.Option(help="Folder with the benchmarks [the one CASA_MECH_DATA names].")]
JudgeName = Annotated[
    str,
    typer.Option(
        help="micro-world, keyword, classifier, yes-no, strong-reject, five-point, refusal, or a rubric's .json file.",
        rich_help_panel="Judge",
    ),
]
BenignData = Annotated[
    str | None,
    typer.Option(
        help="Benign half of the micro-world's examples: plain requests with one answer, or varied: all tasks, harmful "
        "words in harmless uses, several answers [plain]."
    ),
]
GateFolder = Annotated[Path | None, typer.Option(help="Folder that casa-mech train wrote [the model as it is].")]


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
ModelName = Annotated[str, typer.Option(help="organism, organism-split, organism-unasked, a hub id, or a directory.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    title: ClassVar[str] = "Model"

    model: ModelName = "organism"
    device: Device = "auto"
    dtype: Dtype = "auto"

    def check(self) -> None:
        """Refuse what can be refused without torch: an unknown model, device or dtype.

        Raises:
            InputError, ModelError: with the names that are known.
        """
        from casa_mech.cli.checks import check_device, check_dtype
        from casa_mech.omni.checkpoint import local_checkpoint

        local_checkpoint(self.model)
        check_device(self.device)
        check_dtype(self.dtype)


@dataclass(frozen=True)
class SourceOptions:
    """Which queries are read; each option is given once for all of `queries`, or once each, in their order."""

    title: ClassVar[str] = "Queries"

    queries: Annotated[
        list[str],
        typer.Option(
            help="Table, .txt file (a prompt a line), media folder or file, attack's folder, or a benchmark (name or "
            "name:split); repeatable."
        ),
    ]
    column: Annotated[
        list[str] | None,
        typer.Option(help="Prompt column: one for all tables, or one each; - for none [prompt, where there is one]."),
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option(help="harmful or benign: what rows without a label of their own are; - leaves them unlabelled."),
    ] = None
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of labels (harmful or unsafe, benign or safe, in any case); - for none [label, where there is "
            "one]."
        ),
    ] = None
    image_column: Annotated[list[str] | None, typer.Option(help="Column of picture paths, as --column.")] = None
    audio_column: Annotated[list[str] | None, typer.Option(help="Column of clip paths, as --column.")] = None
    text: Annotated[str | None, typer.Option(help="Prompt to go with media that have none [they stand alone].")] = None
    data: Data = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many from each --queries: the first, of a benchmark drawn by --seed."),
    ] = None

    def load(self, seed: int) -> list[LoadedQueries]:
        """The queries of each source, read.

        Raises:
            InputError: a source, column or label that cannot be used.
        """
        from casa_mech.evaluation.sources import load_sources, query_sources

        columns = {
            name: getattr(self, name) or [] for name in ("column", "label_column", "image_column", "audio_column")
        }
        sources = query_sources(
            self.queries, self.label or [], columns, self.text, self.limit, data=self.data, seed=seed
        )
        return load_sources(sources)


@dataclass(frozen=True)
class EvaluatedOptions(SourceOptions):
    """Which queries are evaluated, and what they are called."""

    attack: Annotated[str, typer.Option(help="Name of the attack in the tables.")] = "none"


@dataclass(frozen=True)
class DefenseOptions:
    """The defence that is put to the test."""

    title: ClassVar[str] = "Defence"

    gate: GateFolder = None
    defense: Annotated[str | None, typer.Option(help="Defence by name [what --gate holds, or none].")] = None
    safety_prompt: Annotated[bool, typer.Option(help="Put the safety prompt into the system turn.")] = False
    option: Annotated[list[str] | None, typer.Option(help="Option of the defence, NAME=VALUE; repeatable.")] = None


@dataclass(frozen=True)
class ReplyOptions:
    """How replies are generated."""

    title: ClassVar[str] = "Replies"

    system: Annotated[str | None, typer.Option(help="System prompt of queries that bring none.")] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Upper bound on a reply's tokens.")] = 32


@dataclass(frozen=True)
class JudgeOptions:
    """A judge's options, beside its name."""

    title: ClassVar[str] = "Judge"

    backend: Annotated[str, typer.Option(help="Of rubrics: local, openai (and compatible) or anthropic.")] = "local"
    judge_model: Annotated[str, typer.Option(help="The judging model: hub id, directory, or the API's name.")] = ""
    base_url: Annotated[str, typer.Option(help="Address of the judge's API, https://host/v1 [the vendor's].")] = ""
    key_env: Annotated[str, typer.Option(help="Environment variable of the judge's key [the vendor's usual one].")] = ""
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the judge at a time.")] = 4
    tries: Annotated[int, typer.Option(min=1, help="Requests for one reply before the judge counts as down.")] = 6
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for the whole of an answer of the judge.")] = 60.0
    input_price: Annotated[float | None, typer.Option(help="Dollars for a million of the judge's input tokens.")] = None
    output_price: Annotated[float | None, typer.Option(help="Dollars for a million of its output tokens.")] = None
    positive: Annotated[list[str] | None, typer.Option(help="A classifier's label that means success; repeatable.")] = (
        None
    )
    threshold: Annotated[float, typer.Option(min=0, max=1, help="A classifier's least probability.")] = 0.5

    def check(self, name: str) -> None:
        """Refuse what can be refused of the judge `name` (empty: the default one) without torch.

        Raises:
            InputError: as `check_judge`.
        """
        if not name and (self.judge_model or self.base_url or self.backend != "local"):
            raise InputError("--judge-model, --base-url and --backend are for a judge: name it with --judge")
        if name:
            from casa_mech.judging.registry import check_judge

            check_judge(name, self.backend, self.judge_model)

    def load(self, name: str, device: str, dtype: str, batch_size: int) -> Judge:
        """The judge `name`; `device`, `dtype` and `batch_size` are of a local one.

        Raises:
            InputError, ModelError: as `load_judge`.
        """
        from casa_mech.judging import load_judge

        return load_judge(
            name, self.backend, self.judge_model, positive=self.positive or (), threshold=self.threshold,
            device=device, dtype=dtype, batch_size=batch_size, base_url=self.base_url, key_env=self.key_env,
            concurrency=self.concurrency, tries=self.tries, timeout=self.timeout, input_price=self.input_price,
            output_price=self.output_price,
        )  # fmt: skip


class _Command(TyperCommand):
    """A subcommand whose help lists the options of each record under the record's title."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (line := parameter.get_help_record(ctx)) is not None:
                is_argument = parameter.param_type_name == "argument"
                title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append(line)
        for title, lines in sections.items():
            with formatter.section(title):
                formatter.write_dl(lines)


def command(
    group: typer.Typer, name: str | None = None, *, example: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that makes a function a subcommand of `group`, with an example at the end of its help.

    A parameter whose type is one of the records above (or any dataclass with a `title`) becomes an option for each
    field; the parameter's default says the options' defaults, `...` in one of its fields that it must be given.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        group.command(name, cls=_Command, epilog=f"Example:  {example}")(_with_options(function))
        return function

    return register


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with its records taken apart, as typer reads functions: each option a parameter."""
    hints = get_type_hints(function, include_extras=True)
    records: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and is_dataclass(kind):
            records[parameter.name] = kind
            parameters += _parameters_of(kind, parameter.default)
        else:
            parameters.append(
                inspect.Parameter(
                    parameter.name, inspect.Parameter.KEYWORD_ONLY, default=parameter.default, annotation=kind
                )
            )

    @wraps(function)
    def run(**values: Any) -> None:
        taken = {name: {f.name: values.pop(f.name) for f in fields(kind)} for name, kind in records.items()}
        function(**values, **{name: kind(**taken[name]) for name, kind in records.items()})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters_of(kind: type[Any], default: Any) -> list[inspect.Parameter]:
    """A parameter for each field of the record; its default is the field's in the record `default`, or its own."""
    hints = get_type_hints(kind, include_extras=True)
    parameters = []
    for field in fields(kind):
        if default is not inspect.Parameter.empty:
            value = getattr(default, field.name)
        else:
            value = inspect.Parameter.empty if field.default is MISSING else field.default
        annotation = _titled(hints[field.name], kind.title)
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)
        )
    return parameters


def _titled(annotation: Any, title: str) -> Any:
    """`Annotated[type, typer.Option(...)]`, listed under `title`."""
    kind, option = get_args(annotation)
    titled = copy(option)
    titled.rich_help_panel = title
    return Annotated[kind, titled]


def parse_values(pairs: list[str] | None, option: str = "--option") -> dict[str, Any]:
    """NAME=VALUE pairs as a dict; a value is read as JSON where it is JSON, else as text.

    Raises:
        InputError: a pair without a name or an equals sign.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"{option} {pair}: write it as NAME=VALUE")
        try:
            values[name.replace("-", "_")] = json.loads(value)
        except RecursionError:
            raise InputError(f"{option} {name}: its value is nested too deep") from None
        except ValueError:
            values[name.replace("-", "_")] = value
    return values
