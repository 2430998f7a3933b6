"""`casa-mech audit`: what the safety token of a trained gate causes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from casa_mech.cli.app import app
from casa_mech.cli.checks import check_trained
from casa_mech.cli.options import Data, Json, JudgeName, JudgeOptions, ModelOptions, ReplyOptions, Seed, command
from casa_mech.cli.printing import show
from casa_mech.errors import InputError


@command(
    app,
    example="casa-mech audit --gate gate --out audit   "
    "(own queries: casa-mech audit --gate gate --queries labelled.csv --queries pictures-of-both-labels/ --out audit)",
)
def audit(
    gate: Annotated[Path, typer.Option(help="Folder of a gate (casa-mech train).")],
    queries: Annotated[
        list[str] | None,
        typer.Option(help="Labelled table, attack's folder or benchmark; repeatable [the micro-world's]."),
    ] = None,
    data: Data = None,
    attacks: Annotated[
        str, typer.Option(help="Of the micro-world, with commas between.")
    ] = "plain,jailbreak,spelled,image,audio",
    n: Annotated[int, typer.Option(min=2, help="Requests of the micro-world of each attack and label.")] = 150,
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
    """
    model.check()
    check_trained(gate, gate_only=True)
    if out is not None:
        import casa_mech.figures  # noqa: F401  (a missing extra is found before the work)
        from casa_mech.files import check_folder

        check_folder(out, create=True)
    from casa_mech.audit import audit as audit_system
    from casa_mech.casa import Casa
    from casa_mech.compare.sets import WorldSets
    from casa_mech.evaluation.sources import load_sources, query_sources
    from casa_mech.omni import GenerationSettings, load_omni

    loaded = load_sources(query_sources(queries, [], {}, None, None, data=data, seed=seed)) if queries else []
    omni = load_omni(model.model, device=model.device, dtype=model.dtype)
    if queries:
        audited = [query for source in loaded for query in source.queries]
    elif omni.speaks_micro_world:
        sets = WorldSets(tuple(name.strip() for name in attacks.split(",") if name.strip()), n)
        audited = [query for cell in sets.cells() for query in sets.queries(cell, seed, omni)]
    else:
        raise InputError(f"{model.model} does not speak the micro-world: give labelled --queries of your own")
    settings = GenerationSettings(max_new_tokens=replies.max_new_tokens, system=replies.system)
    chosen_judge = judging.load(judge, model.device, model.dtype, settings.batch_size) if judge else None
    casa = Casa.from_pretrained(gate, omni)
    result = audit_system(casa, audited, chosen_judge, settings=settings, seed=seed, progress=True)
    written = result.save(out) if out is not None else None
    split = result.split()
    show(
        {
            "model": model.model,
            "gate": str(gate),
            "refused under a forced token": result.effects().query("outcome == 'refused'").to_dict("records"),
            "fall of the share answered, by cause": split.to_dict("records"),
            "out": str(written) if written else None,
        },
        as_json,
    )
