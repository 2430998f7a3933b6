"""Build an organism: train it, measure it, and put it in place only when both are done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from casa_mech.errors import InputError, RunError
from casa_mech.files import TEMPORARY, check_folder, check_writable, storage_error, writing, writing_folder
from casa_mech.identity import digest_of
from casa_mech.omni import Omni, load_omni
from casa_mech.omni.checkpoint import WEIGHTS
from casa_mech.organism.card import CARD, MIN_N, card, write_card
from casa_mech.organism.premises import PRESETS, Premises
from casa_mech.organism.recipe import recipe_named, recipe_of, stage_keys, train_organism
from casa_mech.organism.training import Checkpoint

CHECKPOINT, LOCK = "training.safetensors", ".build.lock"


def build(
    name: str = "organism",
    out: Path | None = None,
    premises: Premises | None = None,
    seed: int = 0,
    n: int = MIN_N,
    scale: float = 1.0,
    progress: bool = True,
    checkpoint_every: int = 100,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train organism `name` with a fixed seed, save it in half precision and write its card; returns the card.

    A build that was stopped goes on when it is started again with the same arguments, and ends with the same weights.
    One that is finished returns its card.

    Args:
        name: one of `premises.PRESETS`.
        out: where to put it; the package's own weights, which it replaces, when None.
        premises: the knobs of its training; the preset's when None.
        seed: of the initial weights and every draw.
        n: draws in each row of the card.
        scale: factor on the number of training steps, for trying the pipeline out.
        progress: whether to draw progress bars.
        checkpoint_every: steps between writes of the training's state.
        start: the checkpoint of another training whose stages so far are this one's, to begin with.

    Raises:
        InputError: unknown name, or `n` below 1. RunError: `out` cannot be written, holds other files or another
            build, or another build is writing it.
    """
    recipe = (recipe_of(premises) if premises else recipe_named(name)).scaled(scale)
    knobs = premises or PRESETS[name]
    if n < 1:
        raise InputError(f"a card needs at least one draw a row, not n={n}; {MIN_N} is the default")
    keys = stage_keys(recipe, seed)
    target = Path(out) if out is not None else WEIGHTS / name

    def train(checkpoint: Checkpoint) -> Omni:
        return train_organism(name, seed, recipe, progress, checkpoint)

    def measure(saved: Omni, seconds: float) -> dict[str, Any]:
        saved.source = name
        details = {"seed": seed, "scale": scale, "seconds": round(seconds), "key": build_key(keys)}
        return card(saved, n, progress=progress, knobs=knobs.record()) | {"build": details}

    return build_into(target, keys, CARD, train, measure, write_card, checkpoint_every, out is None, start=start)


def build_key(keys: Sequence[str]) -> str:
    """Digest of all that a training depends on."""
    return digest_of(keys[-1])


def build_into(
    target: Path,
    keys: Sequence[str],
    record_name: str,
    train: Callable[[Checkpoint], Omni],
    measure: Callable[[Omni, float], dict[str, Any]],
    write_record: Callable[[dict[str, Any], Path], None],
    checkpoint_every: int = 100,
    replaces: bool = False,
    device: str = "cpu",
    start: Path | None = None,
) -> dict[str, Any]:
    """Train, save in half precision and measure what is saved; what stands in `target` is whole or a checkpoint.

    Args:
        target: the folder; it, and that no other build is in it, is checked before anything is trained.
        keys: see `Checkpoint`; the last one, of all stages, names the build.
        record_name: the file that says what was built, with `build_key(keys)` as its "key" under "build".
        train: the trained model, from where a checkpoint stands.
        measure: the record of a saved model, given also the seconds of its training.
        write_record: writes the record into a folder.
        checkpoint_every: steps between writes of the training's state.
        replaces: whether another build in `target` is replaced, and not refused.
        device: where the saved model is measured.
        start: see `build`.

    Raises:
        RunError: see `build`.
    """
    with _locked(target):
        finished = _finished(target, build_key(keys), record_name, replaces)
        if finished is not None:
            return finished
        if start is not None and not (target / CHECKPOINT).exists():
            with writing(target / CHECKPOINT) as temporary:
                shutil.copyfile(start, temporary)
        checkpoint = Checkpoint(target / CHECKPOINT, keys, checkpoint_every)
        omni = train(checkpoint)
        seconds = checkpoint.seconds
        with writing_folder(target) as folder:
            save_organism(omni, folder)
            record = measure(load_omni(folder, device=device, dtype="float32"), seconds)
            write_record(record, folder)
    return record


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold `target` against a second build, and clear what a killed one left half-written.

    The finished build is written beside the folder and takes its place, so both places are checked.
    """
    for folder in (target.absolute().parent, target):
        check_writable(folder)
    lock = FileLock(target / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{target} is in use by another build: wait for it, or choose another --out") from None
    except OSError as error:
        raise storage_error(error, target) from None
    try:
        for left in target.glob(f"{TEMPORARY}*"):
            left.unlink(missing_ok=True)
        for left in target.absolute().parent.glob(f"{TEMPORARY}????????{target.name}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _finished(target: Path, key: str, record_name: str, replaces: bool) -> dict[str, Any] | None:
    """The record of this very build where it is finished; None where it is to be done or goes on."""
    path = target / record_name
    check_folder(target, [LOCK, CHECKPOINT], record_name)
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        held = record["build"].get("key")
    except (OSError, KeyError, AttributeError, TypeError, ValueError):
        raise RunError(f"{path} is no record of a build: choose a new or empty --out") from None
    if held == key:
        return record
    if not replaces:
        raise RunError(f"{target} holds an organism built with other options: choose a new or empty --out")
    return None


def save_organism(omni: Omni, folder: Path) -> None:
    """Write weights (float16 safetensors), config, tokenizer and processor in the hub's layout."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = omni.model.to(torch.float16)
    model.save_pretrained(folder)
    omni.processor.save_pretrained(folder)
    omni.model.float()
