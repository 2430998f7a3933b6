"""`load_omni`: a model from the hub or a directory, or an organism shipped with the package."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from casa_mech.errors import ModelError, reason_of
from casa_mech.omni.architecture import Architecture
from casa_mech.omni.checkpoint import CONFIG, MICRO_WORLD_FIELD, local_checkpoint, read_config, studied_config
from casa_mech.omni.finite import check_weights
from casa_mech.omni.model import Omni
from casa_mech.omni.processor import load_processor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ORGANISM_CARD = "card.json"
"""A file beside the checkpoint in the folder of an organism of the micro-world."""
SMALL = 1024
"""Width below which one matrix product is too short to share between threads."""


def load_omni(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None
) -> Omni:
    """The model under study with its processor; of a full Qwen2.5-Omni only the thinker is read.

    Any model of a type in `architecture.ARCHITECTURES`: Qwen2.5-Omni, Qwen2.5-VL, Qwen2-Audio, and text decoders.

    A small model on the CPU is set to run in one thread (in this process), unless `OMP_NUM_THREADS` is set.

    Args:
        source: "organism", "organism-split" or "organism-unasked" (shipped), a hub id such as "Qwen/Qwen2.5-Omni-3B" or
            "HuggingFaceTB/SmolLM2-135M-Instruct", or a directory.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" takes the best there is.
        dtype: "float32", "bfloat16", "float16"; "auto" is the checkpoint's own on an accelerator, float32 on the CPU.
        adapter: directory of a peft adapter to merge into the weights (not a CASA gate: see `Casa.from_pretrained`).

    Raises:
        ModelError: unknown source, missing or corrupt files, weights that are not finite, another architecture, or an
            unknown device or dtype.
    """
    directory = find_checkpoint(source)
    target = _device(device)
    architecture, config, stored = _config(directory)
    kind = _dtype(dtype, target, stored)
    state = _weights(directory, architecture.weight_prefix)
    try:
        with _quiet():
            model, info = getattr(transformers, architecture.model_class).from_pretrained(
                None, config=config, state_dict=state, dtype=kind, output_loading_info=True
            )
    except Exception as error:  # the library raises many kinds for sizes that do not go together
        mismatched = "ignore_mismatched_sizes" in str(error)
        reason = "its sizes are not those of the weights" if mismatched else _in_full(error)
        raise ModelError(
            f"{directory}: no model can be built from its {CONFIG} ({reason}); check that file, or download it again"
        ) from None
    unusable = sorted(info["missing_keys"]) or sorted(str(row) for row in info.get("mismatched_keys", ()))
    if unusable:
        raise ModelError(
            f"{directory}: {len(unusable)} weights are missing or misshapen, first {unusable[0]}; download it again"
        )
    if adapter is not None:
        model = _merge_adapter(model, Path(adapter))
        check_weights(model.state_dict(), f"{directory} with the adapter {adapter}", "train the adapter again")
    if kind == torch.float16:
        check_weights(model.state_dict(), f"{directory} as float16", "load it as float32 or bfloat16")
    if (directory / ORGANISM_CARD).is_file() and not hasattr(config, MICRO_WORLD_FIELD):
        warnings.warn(
            f'{directory}/config.json does not say "{MICRO_WORLD_FIELD}": true or false, so the model is taken for one '
            "that reads English; add the line to an organism of an earlier release, or build it again",
            stacklevel=2,
        )
    omni = Omni(model.to(target), load_processor(directory, architecture.towers), str(source))
    _settle_threads(omni)
    return omni


load = load_omni
"""The name for users: `casa_mech.load`."""


def _settle_threads(omni: Omni) -> None:
    # An organism's matrix products take microseconds. Sharing them gains nothing on an idle machine, and on a busy one
    # the threads wait for each other: a training step then takes ten times as long.
    if omni.device.type == "cpu" and omni.d_model < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of transformers' own: a study loads models often, and they are small or already on
    the disk; what is missing or misshapen we say ourselves, in a line."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def find_checkpoint(source: str | Path) -> Path:
    """The directory that holds `source`; a hub id is downloaded, without the shards that hold no thinker weights.

    Raises:
        ModelError: neither a shipped organism, nor a directory with a config.json, nor a hub id that can be reached.
    """
    return local_checkpoint(source) or _download(str(source))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.jinja"]))
        prefix = _config(directory)[0].weight_prefix
        shards = sorted(set(_shards(directory, prefix).values())) if (directory / INDEX).is_file() else [SINGLE]
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.jinja", *shards]))
    except ModelError:
        raise
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot download {hub_id} ({first}); check the name and network, or give a directory"
        ) from None


def _config(directory: Path) -> tuple[Architecture, PreTrainedConfig, str | None]:
    """The architecture, the config of the part that is studied, and the dtype that the checkpoint names."""
    raw = read_config(directory)
    architecture, studied = studied_config(raw, directory)
    dtype = studied.get("dtype") or studied.get("torch_dtype") or raw.get("dtype") or raw.get("torch_dtype")
    try:
        config = getattr(transformers, architecture.config_class).from_dict(studied)
    except Exception as error:  # the library raises many kinds for values of another type
        raise ModelError(f"{directory}/{CONFIG}: {_in_full(error)}; download the checkpoint again") from None
    return architecture, config, dtype if isinstance(dtype, str) else None


def _in_full(error: Exception) -> str:
    """An error of the library in one line; its first line alone often says only where."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _shards(directory: Path, prefix: str) -> dict[str, str]:
    """For each weight of the part that is studied, the shard that holds it by the checkpoint's index."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = {key: index[key] for key in _with_prefix(index.keys(), prefix)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{directory / INDEX} is corrupt ({reason_of(error)}); download it again") from None
    outside = next((name for name in shards.values() if not isinstance(name, str) or Path(name).name != name), None)
    if outside is not None:
        raise ModelError(f"{directory}/{INDEX} names {outside!r}, which is no file beside it; download it again")
    return shards


def _with_prefix(keys: Iterable[str], prefix: str) -> list[str]:
    """The keys that begin with `prefix`, or all where none does: the checkpoint then holds nothing else."""
    keys = list(keys)
    full = any(key.startswith(prefix) for key in keys)
    return [key for key in keys if not full or key.startswith(prefix)]


def _weights(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of the part that is studied, by their names without `prefix`; no other tensor is read."""
    if (directory / INDEX).is_file():
        where = _shards(directory, prefix)
    elif (directory / SINGLE).is_file():
        where = dict.fromkeys(_with_prefix(_read_shard(directory / SINGLE, None), prefix), SINGLE)
    else:
        raise ModelError(f"{directory} has no {SINGLE} or {INDEX}; only safetensors checkpoints are read")
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(set(where.values())):
        keys = [key for key, name in where.items() if name == shard]
        state |= {key.removeprefix(prefix): value for key, value in _read_shard(directory / shard, keys).items()}
    return state


def _read_shard(path: Path, keys: list[str] | None) -> dict[str, Any]:
    """Tensors `keys` of one file; with None, the file's keys alone."""
    try:
        with safe_open(path, framework="pt") as shard:
            tensors = dict.fromkeys(shard.keys()) if keys is None else {key: shard.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing or corrupt ({error}); download the checkpoint again") from None
    if keys is not None:
        check_weights(tensors, path, "download the checkpoint again")
    return tensors


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used ({first}); try cpu, cuda, mps or auto") from None
    return device


def _dtype(name: str, device: torch.device, stored: str | None) -> torch.dtype:
    if name == "auto":
        name = (stored or "bfloat16") if device.type == "cuda" else "float32"
    kind = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; give float32, bfloat16, float16 or auto")
    return kind


def _merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(f"{adapter} has no adapter_config.json; give the directory of a peft adapter")
    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (RuntimeError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{adapter} does not fit this model ({first}); load it on the base it was trained on"
        ) from None
