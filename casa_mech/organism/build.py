"""Build an organism: train it, measure it, and put it in place only when both are done."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from casa_mech.files import writing_folder
from casa_mech.omni import Omni, load_omni
from casa_mech.omni.load import WEIGHTS
from casa_mech.organism.card import MIN_N, card, write_card
from casa_mech.organism.recipe import RECIPES, train_organism


def build(
    name: str = "organism",
    out: Path | None = None,
    seed: int = 0,
    n: int = MIN_N,
    scale: float = 1.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train organism `name` with a fixed seed, save it in half precision and write its card; returns the card.

    Args:
        name: "organism" or "organism-split".
        out: where to put it; the package's own weights when None.
        seed: of the initial weights and every draw.
        n: draws in each row of the card.
        scale: factor on the number of training steps, for trying the pipeline out.
        progress: whether to draw progress bars.

    Raises:
        InputError: unknown name. RunError: `out` cannot be written.
    """
    target = Path(out) if out is not None else WEIGHTS / name
    began = time.perf_counter()
    recipe = RECIPES.get(name)
    omni = train_organism(name, seed, recipe and recipe.scaled(scale), progress)
    seconds = time.perf_counter() - began
    with writing_folder(target) as folder:
        save_organism(omni, folder)
        saved = load_omni(folder, device="cpu")
        saved.source = name
        record = card(saved, n, progress=progress) | {
            "build": {"seed": seed, "scale": scale, "seconds": round(seconds)}
        }
        write_card(record, folder)
    return record


def save_organism(omni: Omni, folder: Path) -> None:
    """Write weights (float16 safetensors), config, tokenizer and processor in the hub's layout."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = omni.model.to(torch.float16)
    model.save_pretrained(folder)
    omni.processor.save_pretrained(folder)
    omni.model.float()
