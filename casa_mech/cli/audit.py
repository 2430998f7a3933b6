"""`casa-mech audit`: what the safety token of a trained gate causes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casa_mech.cli.app import app
from casa_mech.cli.checks import check_backend, check_choice, check_trained
from casa_mech.cli.options import (
    DefenseOptions,
    EvaluatedOptions,
    Json,
    JudgeName,
    JudgeOptions,
    ModelOptions,
    ReplyOptions,
    Seed,
    command,
    parse_values,
)
from casa_mech.cli.printing import show
from casa_mech.errors import InputError

WITH_TOKEN = ("casa", "ssft-token", "refusal-token")
"""Defences that choose a safety token."""


@command(
    app,
    example="casa-mech audit --gate gate --out audit   "
    "(own queries: casa-mech audit --gate gate --queries goals.csv --column goal --label harmful "
    "--queries questions.csv --column question --label benign --out audit)",
)
def audit(
    defense: DefenseOptions = DefenseOptions(gate=...),  # type: ignore[arg-type]
    queries: EvaluatedOptions = EvaluatedOptions(queries=[]),
    attacks: Annotated[
        str, typer.Option(help="Of the micro-world, with commas between; without --queries.")
    ] = "plain,jailbreak,spelled,image,audio",
    n: Annotated[
        int, typer.Option(min=2, help="Requests of the micro-world of each attack and label; without --queries.")
    ] = 150,
    out: Annotated[Path | None, typer.Option(help="Folder for the replies, the tables and the figure.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    replies: ReplyOptions = ReplyOptions(),
    judge: JudgeName = "",
    judging: JudgeOptions = JudgeOptions(),
    model: ModelOptions = ModelOptions(),
) -> None:
    """Answer queries with the safety token forced to safe, to unsafe and to a random word, and split what a gate does.

    Harmful requests and benign counterparts, six replies each: two by the model without its gate, four behind it.

    Without --queries, the micro-world's. Queries of your own need labels.
    """
    assert defense.gate is not None
    if defense.safety_prompt:
        raise InputError("an audit takes a gate without a safety prompt: leave out --safety-prompt")
    if defense.defense is not None:
        check_choice("--defense", defense.defense, WITH_TOKEN)
    options = parse_values(defense.option)
    model.check()
    check_trained(defense.gate, gate_only=True)
    judging.check(judge)
    named = tuple(name.strip() for name in attacks.split(",") if name.strip())
    from casa_mech.attacks import attack_named
    from casa_mech.evaluation.sources import check_labels, under_attack

    for name in named:
        attack_named(name)
    own = [under_attack(query, queries.attack) for source in queries.load(seed) for query in source.queries]
    if queries.queries:
        check_labels(own)
    if out is not None:
        check_backend()  # a missing extra, too, is found before the work
        from casa_mech.files import check_folder

        check_folder(out, create=True)
    from casa_mech.audit import audit as audit_system
    from casa_mech.compare.sets import WorldSets
    from casa_mech.defenses import load_defense
    from casa_mech.defenses.registry import check_defense
    from casa_mech.defenses.trained import saved_as
    from casa_mech.omni import GenerationSettings, load_omni

    name = defense.defense or saved_as(defense.gate)
    check_defense(name, defense.gate, options)
    omni = load_omni(model.model, device=model.device, dtype=model.dtype)
    if not queries.queries:
        if not omni.speaks_micro_world:
            raise InputError(f"{model.model} does not speak the micro-world: give labelled --queries of your own")
        sets = WorldSets(named, n)
        own = [query for cell in sets.cells() for query in sets.queries(cell, seed, omni)]
    settings = GenerationSettings(max_new_tokens=replies.max_new_tokens, system=replies.system)
    omni.check_lengths(own, settings.system)
    chosen_judge = judging.load(judge, model.device, model.dtype, settings.batch_size) if judge else None
    with load_defense(name, omni, path=defense.gate, **options) as system:
        result = audit_system(system, own, chosen_judge, settings=settings, seed=seed, progress=True)
    written = result.save(out) if out is not None else None
    show(
        {
            "model": model.model,
            "gate": str(defense.gate),
            "defense": result.defense,
            "refused under a forced token": result.effects().query("outcome == 'refused'").to_dict("records"),
            "fall of the share answered, by cause": result.split().to_dict("records"),
            "answered behind a hard gate": result.ceilings().to_dict("records"),
            "calibrated on text": result.text_benign,
            "out": str(written) if written else None,
        },
        as_json,
    )
