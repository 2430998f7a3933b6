"""Checks of options and files that need no model: made before torch is imported, so that a mistake is said at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from casa_mech.errors import InputError, ModelError, reason_of

GATE_FILE, DEFENSE_FILE = "casa_config.json", "defense.json"
"""The file by which the folder of a trained gate is known, and that of another trained defence."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """InputError, listing the choices, unless `value` is one of them."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not '{value}'")


def check_device(name: str) -> None:
    """InputError unless `name` has the form of a device; whether this machine has it, torch says later."""
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", name):
        raise InputError(f"--device {name}: give auto, cpu, cuda, cuda:1 or mps")


def check_dtype(name: str) -> None:
    """InputError unless `name` is a dtype that models are loaded in."""
    check_choice("--dtype", name.removeprefix("torch."), DTYPES)


def check_trained(folder: Path, gate_only: bool = False) -> None:
    """Refuse a --gate that is no folder of a trained defence.

    Raises:
        ModelError: no such folder, one that no training wrote, or, with `gate_only`, one of a defence that is no gate.
    """
    if not folder.is_dir():
        raise ModelError(f"no folder {folder}; give --gate the folder that casa-mech train wrote")
    names = [name for name in (GATE_FILE, DEFENSE_FILE) if (folder / name).is_file()]
    if not names:
        raise ModelError(
            f"{folder} holds no gate or other trained defense ({GATE_FILE}, {DEFENSE_FILE}); give --gate the folder "
            "that casa-mech train wrote"
        )
    if gate_only and GATE_FILE not in names:
        raise ModelError(
            f"{folder} holds a trained defense that is no gate: casa-mech evaluate --gate {folder} runs it"
        )
    try:
        json.loads((folder / names[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / names[0]} is corrupt ({reason_of(error)}); train it again") from None


def check_files(paths: Sequence[Path], option: str) -> None:
    """InputError, naming the first of `paths` that is no file."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{option} {path}: no such file; check the path")


def check_backend() -> None:
    """Import what draws, before the work that is to be drawn. InputError for a MPLBACKEND that matplotlib lacks."""
    try:
        import casa_mech.figures  # noqa: F401
    except ValueError:
        backend = os.environ.get("MPLBACKEND", "")
        raise InputError(f"MPLBACKEND={backend}: matplotlib has no such backend; unset it, or set it to agg") from None
