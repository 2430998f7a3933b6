"""`casa-mech train`: a gate from the micro-world's examples or a researcher's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from casa_mech.casa import Casa, CasaConfig, TrainSettings
from casa_mech.errors import InputError, RunError
from casa_mech.files import write_text
from casa_mech.omni import load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries.files import ExampleReading, read_examples
from casa_mech.study.threads import settle_threads


def train_gate(
    model: str,
    out: Path,
    casa: Mapping[str, Any],
    training: Mapping[str, Any],
    data: Path | None = None,
    columns: tuple[str, str, str] = ("prompt", "reply", "label"),
    n_examples: int = 2000,
    *,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Train a gate on text and save it in `out`; a training that was stopped there is continued.

    Args:
        model: organism, hub id or directory.
        out: folder for the gate; new, empty, or with a stopped training.
        casa, training: fields of `CasaConfig` and `TrainSettings`.
        data: a table of examples; None: the micro-world's.
        columns: names of its prompt, reply and label columns.
        n_examples: how many of the micro-world's.
        device, dtype: as for `load_omni`.

    Returns:
        What was trained: the folder, steps and the last step's metrics.

    Raises:
        InputError: a setting or table that cannot be used. RunError: `out` holds something else.
    """
    try:
        config, settings = CasaConfig.model_validate(casa), TrainSettings.model_validate(training)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}") from None
    work = out / "training"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not work.is_dir())):
        raise RunError(f"{out} holds other files: choose a new or empty folder with --out")
    seed = settings.seed
    made = [] if data else default_world().training_examples(n_examples, seed)
    read = read_examples(data, *columns) if data else ExampleReading(made)
    examples = read.examples
    gate = Casa.attach(settle_threads(load_omni(model, device=device, dtype=dtype)), config)
    work.mkdir(parents=True, exist_ok=True)
    log = gate.train(examples, settings, out=work, resume=True, progress=True)
    metrics = (work / "metrics.jsonl").read_text(encoding="utf-8")
    gate.save_pretrained(out)  # takes the place of the folder, the checkpoints in `work` included
    write_text(out / "metrics.jsonl", metrics)
    trained = {"examples": len(examples), "dropped_minors": len(read.dropped), "steps": len(log), "last": log[-1]}
    return {"model": model, "out": str(out), **trained}
