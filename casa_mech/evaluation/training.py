"""`casa-mech train`: a gate, or another defence, from the micro-world's examples or a researcher's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casa_mech.casa import TrainSettings
from casa_mech.casa.checkpoint import METRICS
from casa_mech.defenses import DEFENSES, train_defense
from casa_mech.defenses.registry import defense_entry, options
from casa_mech.defenses.training import WORK
from casa_mech.errors import InputError
from casa_mech.files import check_folder
from casa_mech.omni import load_omni
from casa_mech.omni.checkpoint import speaks_micro_world
from casa_mech.organism.world import default_world
from casa_mech.queries.files import LoadedExamples, read_examples

STEPS = 200
"""Steps of a supervised training that names none: enough for the organism. Circuit breakers have their own number."""


def train_gate(
    model: str,
    out: Path,
    settings: Mapping[str, Any],
    data: Path | None = None,
    columns: tuple[str, str, str] | tuple[str, str, str, str | None] = ("prompt", "reply", "label"),
    n_examples: int = 2000,
    *,
    defense: str = "casa",
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
    options(defense, recipe.records, settings)  # before the model is loaded
    check_folder(out, owned=[WORK])
    if data is None and not speaks_micro_world(model):
        raise InputError(
            f"{model} is no organism, and the micro-world's examples are not for it: give --data, a table of prompts, "
            "replies and labels"
        )
    loaded = (
        read_examples(data, *columns) if data else LoadedExamples(default_world().training_examples(n_examples, seed))
    )
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
