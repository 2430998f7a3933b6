"""`casa-mech calibrate`: options beyond the paper for a gate that is trained already, and what they are fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from casa_mech.casa import Casa
from casa_mech.casa.calibration import prompts_by_use
from casa_mech.casa.checkpoint import METRICS
from casa_mech.casa.storage import read_stored
from casa_mech.defenses.casa import world_prompts
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.files import check_folder, write_text
from casa_mech.omni import load_omni
from casa_mech.queries import Query


def calibrate_gate(
    model: str,
    gate: Path,
    changes: Mapping[str, Any],
    queries: Sequence[Query] = (),
    out: Path | None = None,
    n: int = 50,
    *,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Change how a saved gate is used, calibrate it and save it again.

    Args:
        model: the one that it was trained on.
        gate: its folder.
        changes: fields of `InferenceSettings`.
        queries: text and media, read without their labels; those labelled benign also set the threshold, text of both
            labels the direction. Empty: the micro-world's, for an organism alone.
        out: a folder for the result, new or empty; None: in the gate's place.
        n: requests of each label and surface from the micro-world.
        seed: of these requests.
        device, dtype: as for `load_omni`.

    Returns:
        The folder, the options beyond the paper and the numbers of calibration prompts.

    Raises:
        InputError: options or queries that do not fit, or no queries for a model that is no organism.
    """
    read_stored(gate).config.changed(**changes)  # before the model is loaded
    if out is not None:
        check_folder(out)
    omni = load_omni(model, device=device, dtype=dtype)
    if not queries and not omni.speaks_micro_world:
        raise InputError(f"{model} is no organism: give --queries to calibrate on, text and media of each kind in use")
    casa = Casa.from_pretrained(gate, omni)
    casa.use(**changes)
    chosen = list(queries) or world_prompts(n, Draw.CALIBRATION + seed)
    benign, labelled = prompts_by_use(chosen)
    calibration = casa.calibrate(chosen, benign=benign, labelled=labelled, progress=True)
    lacking = calibration.lacks(casa.config)
    if lacking:
        raise InputError(f"{gate} cannot be used like that on these queries: {lacking}")
    log = (gate / METRICS).read_text(encoding="utf-8") if (gate / METRICS).is_file() else None
    folder = out or gate
    casa.save_pretrained(folder)
    if log is not None:
        write_text(folder / METRICS, log)
    beyond = casa.config.inference.model_dump()
    return {"model": model, "gate": str(folder), "beyond the paper": beyond, "calibration": calibration.sizes()}
