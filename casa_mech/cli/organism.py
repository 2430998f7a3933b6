"""`casa-mech organism build` and `card`: the embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casa_mech.cli.app import app
from casa_mech.cli.checks import check_choice
from casa_mech.cli.options import Device, Dtype, Json, Seed, command
from casa_mech.cli.printing import show

organism_app = typer.Typer(help="Build the embedded models, and measure their cards.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")


@command(organism_app, "build", example="casa-mech organism build organism --out my-organism")
def organism_build(
    name: Annotated[
        str, typer.Argument(help="organism, organism-split, organism-unasked, first, first-split.")
    ] = "organism",
    knob: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, on or off; repeatable. tolerance, safety_words, rules, alignment, unasked, letter_code, "
            "varied_benign."
        ),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Folder of public prompt sets: train the larger sibling for real English.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the weights [organism-weights/NAME].")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="Where the sibling is trained: cpu, cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Train an embedded model from its micro-world (up to 40 minutes on two cores), or a sibling from a corpus.

    A build that was stopped goes on when the same command is given again.
    """
    from casa_mech.organism import build
    from casa_mech.organism.premises import PRESETS

    if corpus is not None:
        from casa_mech.files import check_writable
        from casa_mech.organism.corpus import read_corpus
        from casa_mech.organism.sibling import build_sibling

        target = out or Path("organism-weights") / "corpus"
        check_writable(target)
        _print_build(build_sibling(read_corpus(corpus, seed), target, seed, device=device), "corpus", target, as_json)
        return
    check_choice("NAME", name, tuple(PRESETS))
    target = out or Path("organism-weights") / name
    premises = PRESETS[name].changed(knob or ())
    _print_build(build(name, out=target, premises=premises, seed=seed)["build"], name, target, as_json)


def _print_build(record: dict[str, Any], name: str, target: Path, as_json: bool) -> None:
    show({"name": name, "out": str(target), **record}, as_json)


@command(organism_app, "card", example="casa-mech organism card organism-split --n 300 --json")
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
    rows = card(name, n=n, seed=seed, out=target)["rows"]
    show({"name": name, "seed": seed, "out": str(target), "rows": rows}, as_json)


@command(
    organism_app,
    "gate",
    example="casa-mech organism gate organism-weights/corpus --corpus data --out english --json",
)
def organism_gate(
    model: Annotated[str, typer.Argument(help="A sibling that was built from the corpus, a hub id, or a directory.")],
    corpus: Annotated[Path, typer.Option(help="Folder of public prompt sets, for training and for measuring.")],
    out: Annotated[Path, typer.Option(help="Folder for the gate, the tables and the manifest.")],
    n: Annotated[int, typer.Option(min=6, help="Prompts of each set, as text.")] = 500,
    n_media: Annotated[int, typer.Option(min=6, help="Prompts of each set, as pictures and speech.")] = 150,
    examples: Annotated[int, typer.Option(min=8, help="Training prompts, half of them harmful.")] = 4000,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train CASA on real prompts as plain text, and measure it on public sets that it never saw."""
    from casa_mech.reports.real_english.experiment import GateSizes, english_gate

    sizes = GateSizes(examples=examples, steps=steps, n=n, n_media=n_media)
    show(english_gate(model, corpus, out, sizes=sizes, seed=seed, device=device, dtype=dtype), as_json)
