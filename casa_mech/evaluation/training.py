"""`casa-mech train`: a gate, or another defence, from the micro-world's examples or a researcher's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from casa_mech.casa import TrainSettings
from casa_mech.casa.checkpoint import METRICS
from casa_mech.defenses import DEFENSES, train_defense
from casa_mech.defenses.registry import defense_entry, training_options
from casa_mech.defenses.training import check_training_folder
from casa_mech.errors import InputError
from casa_mech.omni import load_omni
from casa_mech.omni.checkpoint import speaks_micro_world
from casa_mech.organism.premises import varied_training_examples
from casa_mech.organism.world import default_world
from casa_mech.queries import Example
from casa_mech.queries.files import LoadedExamples, read_examples

Benign = Literal["plain", "varied"]
"""The benign half of the micro-world's examples: requests with one stub answer, or questions of all tasks, harmless
uses of harmful words among them, with answers of several openings."""
STEPS = 200
"""Steps of a supervised training that names none: enough for the organism. Circuit breakers have their own number."""


def check_benign(benign: str, option: str, own_table: bool = False) -> Benign:
    """`benign`, if it is a choice of benign data; `option` names it in the message.

    Raises:
        InputError: another name, or `varied` beside a table of one's own (`own_table`).
    """
    if benign not in get_args(Benign):
        raise InputError(f"{option} must be one of {', '.join(get_args(Benign))}, not {benign!r}")
    if own_table and benign != "plain":
        raise InputError(f"{option} {benign} is for the micro-world's examples; a table has benign rows of its own")
    return cast(Benign, benign)


def world_examples(n: int, seed: int, benign: Benign = "plain") -> list[Example]:
    """`n` training examples of the micro-world, half harmful with a refusal, the other half as `benign` says.

    Raises:
        InputError: as `check_benign`.
    """
    check_benign(benign, "benign")
    world = default_world()
    return varied_training_examples(world, n, seed) if benign == "varied" else world.training_examples(n, seed)


def train_gate(
    model: str,
    out: Path,
    settings: Mapping[str, Any],
    data: Path | None = None,
    columns: tuple[str, str, str] | tuple[str, str, str, str | None] = ("prompt", "reply", "label"),
    n_examples: int = 2000,
    *,
    defense: str = "casa",
    benign: str = "plain",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Train a defence on text and save it in `out`; a training that was stopped there is continued.

    Args:
        model: organism, hub id or directory.
        out: folder for the defence; new, empty, or with a stopped training.
        settings: options in training, fields of the records in `DEFENSES[defense].recipe`.
        data: a table of examples; None: the micro-world's, for an organism alone.
        columns: names of its prompt, reply and label columns and, for circuit breakers, of harmful completions.
        n_examples: how many of the micro-world's.
        defense: which of `DEFENSES`.
        benign: the benign half of the micro-world's examples (see `Benign`).
        seed: of the micro-world's examples and of the training.
        device, dtype: as for `load_omni`.

    Returns:
        What was trained: the folder, steps and the last step's metrics.

    Raises:
        InputError: a setting or table that cannot be used, or no table for a model that is no organism.
        RunError: `out` holds something else.
    """
    recipe = defense_entry(defense).recipe
    if recipe is None:
        names = ", ".join(name for name, entry in DEFENSES.items() if entry.trains)
        raise InputError(f"--defense {defense} needs no training; those that do: {names}")
    if TrainSettings in recipe.records:
        settings = {"max_steps": STEPS, **settings}
    kind = check_benign(benign, "--benign", own_table=data is not None)
    training_options(defense, settings)  # before the model is loaded
    check_training_folder(out)
    if data is None and not speaks_micro_world(model):
        raise InputError(
            f"{model} is no organism, and the micro-world's examples are not for it: give --data, a table of prompts, "
            "replies and labels"
        )
    loaded = read_examples(data, *columns) if data else LoadedExamples(world_examples(n_examples, seed, kind))
    omni = load_omni(model, device=device, dtype=dtype)
    train_defense(defense, omni, loaded.examples, out, seed=seed, **settings)
    log = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    return {
        "model": model,
        "defense": defense,
        "out": str(out),
        "examples": len(loaded.examples),
        "dropped_minors": len(loaded.dropped),
        "steps": len(log),
        "last": log[-1],
    }
