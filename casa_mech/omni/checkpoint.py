"""What is known of a checkpoint from its name and its `config.json` alone: no weights are read, torch is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casa_mech.errors import ModelError, reason_of
from casa_mech.omni.architecture import Architecture, architecture_of

ORGANISMS = ("organism", "organism-split", "organism-unasked")
WEIGHTS = Path(__file__).parent.parent / "organism" / "weights"
CONFIG = "config.json"
MICRO_WORLD_FIELD = "micro_world"
"""The field of a checkpoint's `config.json` that is true for an organism of the micro-world."""


def local_checkpoint(source: str | Path) -> Path | None:
    """The directory that holds `source`; None for a hub id, which may have to be downloaded.

    Raises:
        ModelError: neither a shipped organism, nor a directory with a `config.json`, nor of a hub id's form.
    """
    if str(source) in ORGANISMS:
        directory = WEIGHTS / str(source)
        if not (directory / CONFIG).is_file():
            way_out = f"run casa-mech organism build {source}, then give the folder it names"
            raise ModelError(f"{source} is not in this installation; {way_out}")
        return directory
    if Path(source).is_dir():
        if not (Path(source) / CONFIG).is_file():
            raise ModelError(f"{source} has no {CONFIG}; give a checkpoint directory, a hub id or one of {ORGANISMS}")
        return Path(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ModelError(f"unknown model {source!r}; give one of {ORGANISMS}, a directory, or a hub id like owner/name")
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`.

    Raises:
        ModelError: it cannot be read, or is no JSON object.
    """
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_of(error)
        raise ModelError(f"{directory}/{CONFIG} cannot be read ({reason}); download the checkpoint again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{directory}/{CONFIG} is no JSON object; download the checkpoint again")
    return config


def studied_config(config: Mapping[str, Any], directory: Path | str) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that a checkpoint's `config.json` names, and the part of it about the model that is studied.

    Raises:
        ModelError: a model without an `Architecture`, or a part that is no JSON object.
    """
    architecture = architecture_of(config.get("model_type"), str(directory))
    studied = config.get(architecture.config_key, config)
    if not isinstance(studied, dict):
        raise ModelError(
            f"{directory}/{CONFIG}: {architecture.config_key} is no JSON object; download the checkpoint again"
        )
    return architecture, studied


def speaks_micro_world(source: str | Path) -> bool:
    """True for an organism of the micro-world, as its `config.json` says; a hub id is taken for none.

    Raises:
        ModelError: as `local_checkpoint` and `read_config`, or a model without an `Architecture`.
    """
    directory = local_checkpoint(source)
    if directory is None:
        return False
    return bool(studied_config(read_config(directory), directory)[1].get(MICRO_WORLD_FIELD, False))
