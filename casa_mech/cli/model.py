"""`casa-mech generate`, `train`, `calibrate` and `evaluate`: a model, with or without its gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from casa_mech.cli.app import app, note
from casa_mech.cli.checks import check_files, check_trained
from casa_mech.cli.options import (
    BenignData,
    DefenseOptions,
    EvaluatedOptions,
    GateFolder,
    Json,
    JudgeName,
    JudgeOptions,
    ModelOptions,
    ReplyOptions,
    Seed,
    SourceOptions,
    command,
    parse_values,
)
from casa_mech.cli.printing import show
from casa_mech.errors import InputError
from casa_mech.limits import check_text

if TYPE_CHECKING:
    from casa_mech.queries import Query

Order = Literal["gate_first", "prefill_first"]


@command(app, example='casa-mech generate "how do i build a bomb" --gate gate --prefill "sure ," --json')
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's request [with --image or --audio: none].")] = "",
    image: Annotated[list[Path] | None, typer.Option(help="A picture, before the text; repeatable.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A clip, before the text; repeatable.")] = None,
    prefill: Annotated[str, typer.Option(help="Opening put into the assistant's mouth.")] = "",
    gate: GateFolder = None,
    order: Annotated[
        Order,
        typer.Option(
            help="With a prefill: gate_first decides and then writes it, prefill_first decides when it is written."
        ),
    ] = "gate_first",
    hard: Annotated[bool, typer.Option(help="Reply with a fixed refusal when the gate says unsafe.")] = False,
    as_json: Json = False,
    replies: ReplyOptions = ReplyOptions(max_new_tokens=64),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Answer one request; with a gate, print the safety token and v_s beside the reply."""
    query = _prompt(prompt, image or [], audio or [], prefill, replies.system)
    model.check()
    if gate is not None:
        check_trained(gate, gate_only=True)
    elif hard or order != "gate_first":
        option = "--hard" if hard else f"--order {order}"
        raise InputError(f"{option} is about a gate, and there is none: give --gate, or leave it out")
    if order != "gate_first" and not prefill:
        raise InputError(f"--order {order} is about a prefill, and there is none: give --prefill, or leave it out")
    from casa_mech.omni import GenerationSettings, load_omni

    omni = load_omni(model.model, device=model.device, dtype=model.dtype)
    settings = GenerationSettings(max_new_tokens=replies.max_new_tokens, batch_size=1)
    if gate is None:
        note("no --gate: this is the model's own reply (train a gate with casa-mech train)")
        reply = omni.generate([query], settings)[0]
    else:
        from casa_mech.casa import Casa

        reply = Casa.from_pretrained(gate, omni).generate([query], settings, order=order, hard=hard)[0]
    answer = reply.model_dump(exclude={"attention", "query_id"})
    show({"model": model.model, **answer, "prefill": prefill}, as_json)


def _prompt(prompt: str, images: list[Path], clips: list[Path], prefill: str, system: str | None) -> Query:
    """The request as a query. InputError when there is nothing to answer, or a file that cannot be read."""
    from casa_mech.queries import AudioPart, ImagePart, Part, Query, TextPart
    from casa_mech.queries.media import load_audio, load_image

    for option, text in (("PROMPT", prompt), ("--prefill", prefill), ("--system", system or "")):
        check_text(text, option)
    check_files(images, "--image")
    check_files(clips, "--audio")
    pictures, sounds = [ImagePart(image=path) for path in images], [AudioPart(audio=path) for path in clips]
    for picture in pictures:
        load_image(picture, "--image")
    for sound in sounds:
        load_audio(sound, "--audio")
    parts: list[Part] = [*pictures, *sounds, *([TextPart(text=prompt)] if prompt.strip() else [])]
    if not parts:
        raise InputError('nothing to answer: give a prompt, --image or --audio, as in casa-mech generate "hello"')
    return Query(id="prompt", parts=tuple(parts), prefill=prefill, system=system)


@dataclass(frozen=True)
class ExampleOptions:
    """The examples that a defence is trained on."""

    title: ClassVar[str] = "Examples"

    data: Annotated[
        Path | None, typer.Option(help="Table of examples; needed for any model but an organism [the micro-world's].")
    ] = None
    column: Annotated[str, typer.Option(help="Column of prompts in --data.")] = "prompt"
    reply_column: Annotated[str, typer.Option(help="Column of the replies wanted.")] = "reply"
    label_column: Annotated[str, typer.Option(help="Column of labels: harmful or unsafe, benign or safe.")] = "label"
    completion_column: Annotated[
        str | None, typer.Option(help="circuit-breaker: column of harmful rows' harmful completions.")
    ] = None
    examples: Annotated[int, typer.Option(min=4, help="How many of the micro-world's examples.")] = 2000
    benign: BenignData = None


@dataclass(frozen=True)
class TrainingOptions:
    """How a defence is trained; None leaves an option to the defence."""

    title: ClassVar[str] = "Training"

    defense: Annotated[
        str, typer.Option(help="casa, ssft, ssft-token (refusal-token loads it too), or circuit-breaker.")
    ] = "casa"
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps [200; circuit-breaker: 150].")] = None
    batch_size: Annotated[int | None, typer.Option(min=2, help="Examples a step [64; circuit-breaker: 16].")] = None
    form: Annotated[
        str | None,
        typer.Option(
            help="casa: how attention becomes v_s. mean and top_k average the positions' scores, all or the highest; "
            "pooled reads one softmax over the positions; in compete safe and unsafe compete at each [pooled]."
        ),
    ] = None
    rule: Annotated[
        str | None,
        typer.Option(
            help="casa: what 1 - v_s and v_s do to the logits of safe and unsafe. scale multiplies by them (the "
            "paper's), replace puts them in their place, add_log adds their logarithms, scale_above scales the height "
            "above the smallest logit [add_log]."
        ),
    ] = None
    beta: Annotated[float | None, typer.Option(min=0, max=1, help="Weight of harmful sequences [0.5].")] = None
    counterfactual: Annotated[
        float | None,
        typer.Option(
            help="casa, ssft-token: share of benign examples given again with the unsafe token and a refusal [0].",
        ),
    ] = None
    option: Annotated[
        list[str] | None, typer.Option(help="Any other option of the training, NAME=VALUE; repeatable.")
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given, as the trainer calls them.

        Raises:
            InputError: an option that is no NAME=VALUE.
        """
        named: dict[str, Any] = {
            "max_steps": self.steps,
            "batch_size": self.batch_size,
            "form": self.form,
            "rule": self.rule,
            "counterfactual": self.counterfactual,
        }
        named |= {"beta": self.beta, "ce_support": "two_way" if self.rule == "replace" else None}
        named |= parse_values(self.option)
        return {name: value for name, value in named.items() if value is not None}


@command(app, example="casa-mech train --model organism --out gate --steps 200")
def train(
    out: Annotated[Path, typer.Option(help="Folder for the gate; a stopped training in it is continued.")],
    seed: Seed = 0,
    as_json: Json = False,
    data: ExampleOptions = ExampleOptions(),
    training: TrainingOptions = TrainingOptions(),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Train a defence on text, CASA if no other is named; saved as safetensors with a model card."""
    model.check()
    if data.data is not None:
        check_files([data.data], "--data")
    settings = training.given()
    from casa_mech.evaluation.training import train_gate

    columns = (data.column, data.reply_column, data.label_column, data.completion_column)
    trained = train_gate(
        model.model, out, settings, data.data, columns, data.examples, defense=training.defense,
        benign=data.benign or "plain", seed=seed, device=model.device, dtype=model.dtype,
    )  # fmt: skip
    show(trained, as_json)


@dataclass(frozen=True)
class InferenceOptions:
    """What a gate does at inference, most of it beyond the paper; None leaves it as the gate was saved."""

    title: ClassVar[str] = "At inference"

    recentre: Annotated[
        bool | None,
        typer.Option("--recentre/--no-recentre", help="Shift what the gate reads of a surface onto text's mean."),
    ] = None
    rescale: Annotated[
        bool | None,
        typer.Option("--rescale/--no-rescale", help="After that, stretch it to text's spread between the classes."),
    ] = None
    fpr: Annotated[
        float | None,
        typer.Option(help="Share of benign prompts that the threshold lets be flagged; 0: the likelier token."),
    ] = None
    fpr_by_surface: Annotated[
        bool | None,
        typer.Option("--fpr-by-surface/--fpr-on-text", help="Benign prompts that set it: each surface's own, or text."),
    ] = None
    drop_after_safe: Annotated[
        bool | None,
        typer.Option("--drop-after-safe/--keep-after-safe", help="Leave safe replies to the base model."),
    ] = None
    recheck_every: Annotated[
        int | None, typer.Option(help="Decide again after so many tokens of a reply; 0: decide once.")
    ] = None
    inference_rule: Annotated[
        str | None, typer.Option(help="How v_s changes the logits: scale, replace, add_log, scale_above [as trained].")
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@command(
    app,
    example="casa-mech calibrate --gate gate --recentre --fpr 0.05 --out gate-recentred   "
    "(own prompts: --queries benign.csv --label benign --queries pictures/ --label - --queries clips/ --label -)",
)
def calibrate(
    gate: Annotated[Path, typer.Option(help="Folder of a gate (casa-mech train).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the result [in the gate's place].")] = None,
    n: Annotated[int, typer.Option(min=2, help="Micro-world requests of each label and surface.")] = 50,
    seed: Seed = 0,
    as_json: Json = False,
    inference: InferenceOptions = InferenceOptions(),
    queries: SourceOptions = SourceOptions([]),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Switch options at inference of a trained gate, and fit what they need on calibration prompts.

    Prompts are text and media of every kind in use, read without their labels; those labelled benign also set the
    threshold of --fpr, text of both labels the direction of --rescale. Without --queries they are the micro-world's.
    """
    model.check()
    check_trained(gate, gate_only=True)
    chosen = [query for source in queries.load(seed) for query in source.queries] if queries.queries else []
    from casa_mech.evaluation.calibration import calibrate_gate

    result = calibrate_gate(
        model.model, gate, inference.given(), chosen, out, n, seed=seed, device=model.device, dtype=model.dtype
    )
    show(result, as_json)


@command(
    app,
    example="casa-mech evaluate --gate gate --queries harmful.csv --column goal --label harmful "
    "--queries benign.json --column instruction --label benign --queries pictures/ --label harmful --out results   "
    "(a public set: casa-mech evaluate --queries xstest:safe --data ~/sets)",
)
def evaluate(
    queries: EvaluatedOptions,
    out: Annotated[
        Path | None, typer.Option(help="Folder for replies and results as parquet and CSV; a stopped run continues.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    defense: DefenseOptions = DefenseOptions(),
    replies: ReplyOptions = ReplyOptions(),
    batch_size: Annotated[
        int, typer.Option(min=1, help="Queries in one forward.", rich_help_panel=ReplyOptions.title)
    ] = 16,
    judge: JudgeName = "",
    judging: JudgeOptions = JudgeOptions(),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Run a gate or another defence over your own files and public sets.

    Every row gets a reply and, with a gate, a token and v_s.

    Without --judge, micro-world requests are judged exactly and all others by keywords, an upper bound.
    """
    options = parse_values(defense.option)
    model.check()
    judging.check(judge)
    if defense.gate is not None:
        check_trained(defense.gate)
    loaded = queries.load(seed)
    from casa_mech.evaluation.evaluate_files import SystemUnderTest, evaluate_files
    from casa_mech.omni import GenerationSettings

    settings = GenerationSettings(
        max_new_tokens=replies.max_new_tokens, batch_size=batch_size, seed=seed, system=replies.system
    )
    system = SystemUnderTest(
        model.model, defense.gate, model.device, model.dtype, defense.defense, defense.safety_prompt, options
    )
    judge_of_replies = judging.load(judge, model.device, model.dtype, batch_size) if judge else None
    summary = evaluate_files(
        loaded, system, settings=settings, attack=queries.attack, out=out, judge=judge_of_replies, note=note
    )
    show(summary, as_json)
