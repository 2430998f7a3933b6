"""`casa-mech doctor`: the installed versions, the machine, and what would be loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from casa_mech.errors import CasaMechError
from casa_mech.study.manifest import git_state, versions


def examine(model: str = "organism", device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Everything that a problem report should say; what is missing is named with the way out, and nothing raises."""
    return {
        "installed": versions(),
        "git": git_state(),
        "machine": _machine(),
        "speech": _speech(),
        "model": _model(model, device, dtype),
    }


def _machine() -> dict[str, Any]:
    import torch

    machine: dict[str, Any] = {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    try:
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        machine["memory_gib"] = "unknown"
    machine["disk_free_gib"] = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    machine["gpus"] = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus] or "none"
    machine["mps"] = torch.backends.mps.is_available()
    return machine


def _speech() -> dict[str, Any]:
    from casa_mech.attacks import EspeakVoice, VoiceSettings

    try:
        clip = EspeakVoice().synthesise("ok", VoiceSettings())
        return {"espeak-ng": "works", "samples_for_ok": int(clip.shape[0])}
    except Exception as error:  # whatever the C library or the loader does, the report goes on
        return {"espeak-ng": f"does not work ({error}); try: pip install --force-reinstall espeakng-loader"}


def _model(model: str, device: str, dtype: str) -> dict[str, Any]:
    from casa_mech.omni import load_omni
    from casa_mech.omni.load import find_checkpoint

    report: dict[str, Any] = {"source": model}
    cached = _cached(model)
    if cached is not None and not cached:
        return {**report, "status": "would be downloaded from the Hugging Face hub on first use"}
    try:
        directory = find_checkpoint(model)
        files = sorted(directory.glob("*.safetensors"))
        report |= {
            "folder": str(directory),
            "weights_mib": round(sum(file.stat().st_size for file in files) / 2**20, 1),
        }
        if report["weights_mib"] > 1024:
            return {**report, "status": "present; too large to be loaded for a report"}
        omni = load_omni(model, device=device, dtype=dtype)
    except CasaMechError as error:
        return {**report, "status": f"cannot be loaded: {error}"}
    return {
        **report,
        "status": "loads",
        "device": str(omni.device),
        "dtype": str(omni.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in omni.model.parameters()),
        "fingerprint": omni.fingerprint()[:16],
    }


def _cached(model: str) -> bool | None:
    """Whether a hub id is in the local cache; None for what is no hub id."""
    if model.count("/") != 1 or Path(model).exists() or model.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)
