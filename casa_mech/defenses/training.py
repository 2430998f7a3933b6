"""Training of a defence by name into a folder; a stopped training goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casa_mech.casa.checkpoint import METRICS
from casa_mech.casa.storage import CONFIG
from casa_mech.defenses.registry import DEFENSES, training_options
from casa_mech.defenses.trained import FILE, TrainedDefense
from casa_mech.errors import RunError
from casa_mech.files import check_folder, writing_folder
from casa_mech.locks import locked
from casa_mech.omni import Omni
from casa_mech.queries import Example

WORK = "training"
"""Sub-folder of checkpoints; gone once the defence is saved."""


def check_training_folder(out: Path) -> None:
    """Refuse a folder in which a training can neither begin nor go on.

    Raises:
        RunError: it holds a defence whose training is finished, or somebody else's files.
    """
    if any((out / name).is_file() for name in (CONFIG, FILE)):
        raise RunError(f"{out} holds a trained defence: use it with --gate {out}, or give another --out")
    check_folder(out, owned=[WORK])


def train_defense(
    name: str,
    omni: Omni,
    examples: Sequence[Example],
    out: Path | str,
    *,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> TrainedDefense:
    """Train a defence on text and save it in `out`; a training that was stopped there is continued.

    Args:
        name: one of `DEFENSES` that trains.
        omni: the model, which carries the defence afterwards, until it is closed.
        examples: labelled text queries with the replies they should get; for circuit breakers each harmful query
            with its harmful completion in `meta["compliance"]`.
        out: folder; new, empty, or with a stopped training. In the end it holds what `load_defense` reads, and
            `metrics.jsonl`, a row each step.
        seed: of initial values, batches and dropout.
        progress: show a bar.
        settings: options in training; fields of the records in `DEFENSES[name].recipe`, over its preset.

    Raises:
        InputError: an unknown defence or option, one that does not train, or examples that cannot be used.
        RunError: `out` holds something else, another process trains in it, or it cannot be written; or the loss is not
            finite.
        ModelError: the model has an adapter already.
    """
    records = training_options(name, {"seed": seed, **settings})
    recipe = DEFENSES[name].recipe
    assert recipe is not None
    out = Path(out)
    check_training_folder(out)
    work = out / WORK
    with locked(work):
        check_training_folder(out)  # again: another process may have come to its end since
        defense = recipe.attach(omni, *records, seed=seed)
        try:
            defense.train(examples, work, resume=True, progress=progress)
            metrics = (work / METRICS).read_text(encoding="utf-8")
            with writing_folder(out) as new:  # takes the place of the folder, the checkpoints included
                defense.save_pretrained(new)
                (new / METRICS).write_text(metrics, encoding="utf-8")
        except BaseException:
            defense.close()
            raise
    return defense
