"""`casa-mech bench`: the speed ratios, each measured in one process with the two sides taking turns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from casa_mech.casa import Casa, CasaConfig, TrainSettings
from casa_mech.errors import InputError
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Example, Query
from casa_mech.study.threads import settle_threads

BATCH = 16
REPLY_TOKENS = 24


PARTS = ("gate", "defenses", "probes", "lens", "prefill")


def measure_parts(
    parts: Sequence[str], model: str = "organism", repeats: int = 5, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """The benchmarks that `parts` names ("all" for every one), each in its own section; the gate's at the top.

    Raises:
        InputError: an unknown part; the known ones are listed.
    """
    wanted = PARTS if "all" in parts else tuple(dict.fromkeys(parts))
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise InputError(f"no benchmark {unknown[0]!r}; there are {', '.join(PARTS)}, and all")
    found = measure(model, repeats, device, dtype) if "gate" in wanted else {"model": model, "repeats": repeats}
    return found | {part: _part(part, model, repeats, device, dtype) for part in wanted if part != "gate"}


def _part(part: str, model: str, repeats: int, device: str, dtype: str) -> Any:
    if part == "defenses":
        from casa_mech.study.bench_defenses import measure_defenses

        return measure_defenses(model, repeats=repeats, device=device, dtype=dtype)
    if part == "prefill":
        from casa_mech.study.bench_prefill import measure_prefill

        return measure_prefill(model, repeats, device, dtype)
    omni = settle_threads(load_omni(model, device=device, dtype=dtype))
    if part == "probes":
        from casa_mech.study.bench_probes import measure_probes

        return measure_probes(omni, repeats)
    from casa_mech.study.bench_lens import measure_extraction

    return measure_extraction(omni, repeats)


def measure(model: str = "organism", repeats: int = 5, device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Median seconds and ratios: `--help`; gated against plain generation; a CASA step against a plain peft step.

    Both sides of a ratio do the same work: generation of exactly `REPLY_TOKENS` tokens for the same 16 requests by the
    gated model and by the model as it was loaded (the gated side makes its safety token besides); forward, backward and
    AdamW on the same 16 examples with the same LoRA in training mode (the plain side with the ordinary loss).
    """
    omni = settle_threads(load_omni(model, device=device, dtype=dtype))
    world = default_world()
    return {
        "model": model,
        "device": str(omni.device),
        "torch_threads": torch.get_num_threads(),
        "repeats": repeats,
        "help_seconds": round(min(_seconds(_help) for _ in range(3)), 3),
        "generation": time_ratio(
            "gated", "plain", _generation(omni, world.requests(BATCH, seed=1)), repeats, omni, 1.25
        ),
        "training_step": time_ratio(
            "casa", "peft", _steps(omni, world.training_examples(BATCH, 1)), repeats, omni, 1.3
        ),
    }


def _help() -> None:
    subprocess.run([sys.executable, "-m", "casa_mech.cli", "--help"], check=True, stdout=subprocess.DEVNULL)


def _generation(omni: Omni, queries: list[Query]) -> tuple[Callable[[], object], Callable[[], object]]:
    """(gated, plain) generation of as many tokens, whatever the model would say."""
    base = load_omni(omni.source, device=str(omni.device), dtype=str(omni.dtype))
    casa = Casa.attach(omni, CasaConfig())
    settings = GenerationSettings(max_new_tokens=REPLY_TOKENS, batch_size=BATCH)

    for model in (omni.model, base.model):
        model.generation_config.eos_token_id = None
    # The plain side carries neither LoRA nor gate: the ratio is the whole price of the defence.
    return lambda: casa.generate(queries, settings), lambda: base.generate(queries, settings)


def _steps(omni: Omni, examples: list[Example]) -> tuple[Callable[[], object], Callable[[], object]]:
    """(CASA, plain peft) training steps on one batch."""
    casa = Casa.attach(load_omni(omni.source, device=str(omni.device)), CasaConfig())
    parts, model = casa.parts, casa.omni.model
    weights = [weight for group in parts.groups() for weight in group.values()]
    adapter = list(parts.adapter.parameters().values())
    batch_weights = torch.full((len(examples),), 1 / len(examples))
    limit = TrainSettings().max_reply_tokens
    targets = [casa.omni.reply_ids(example.reply)[:limit] for example in examples]
    ours, theirs = torch.optim.AdamW(weights, lr=1e-4), torch.optim.AdamW(adapter, lr=1e-4)

    def gated() -> None:
        model.train()
        ours.zero_grad()
        loss, _ = parts.objective(examples, batch_weights, limit)
        loss.backward()
        ours.step()

    def plain() -> None:
        model.train()
        theirs.zero_grad()
        batch = casa.omni.encode([example.query for example in examples], targets, prefill=False)
        model(**batch.inputs, labels=batch.labels, use_cache=False).loss.backward()
        theirs.step()

    return gated, plain


def time_ratio(
    first: str,
    second: str,
    sides: tuple[Callable[[], object], Callable[[], object]],
    repeats: int,
    omni: Omni,
    allowed: float | None = None,
) -> dict[str, float]:
    """Median seconds of two sides that take turns, and their ratio, with the one allowed if there is one."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for side, record in zip(sides, times, strict=True):
            record.append(_seconds(side, omni.device))
    one, other = (median(record[1:]) for record in times)  # the first round warms up
    measured = {f"{first}_seconds": round(one, 4), f"{second}_seconds": round(other, 4)}
    measured["ratio"] = round(one / other, 3)
    return measured if allowed is None else {**measured, "allowed": allowed}


def _seconds(call: Callable[[], object], device: torch.device | None = None) -> float:
    began = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
