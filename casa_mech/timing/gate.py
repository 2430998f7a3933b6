"""What the gate costs: gated against plain generation, a CASA step against a plain LoRA step and in bfloat16."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from casa_mech.casa import Casa, CasaConfig, TrainSettings
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.omni.precision import bfloat16_products
from casa_mech.organism.world import default_world
from casa_mech.queries import Example, Query
from casa_mech.timing.paired import BATCH, REPLY_TOKENS, Side, seconds, time_ratio

GENERATION, STEP = 1.25, 1.3
"""Most that gated generation may take of plain generation's time, and a CASA step of a plain peft step's."""


def measure_gate(omni: Omni, repeats: int = 5) -> dict[str, Any]:
    """Median seconds and ratios: `--help`; gated against plain generation; a CASA step against a plain peft step.

    Both sides of a ratio do the same work: generation of exactly `REPLY_TOKENS` tokens for the same 16 requests by the
    gated model and by the model as it was loaded (the gated side makes its safety token besides); forward, backward and
    AdamW on the same 16 examples with the same LoRA in training mode (the plain side with the ordinary loss). For a
    model in float32 also a CASA step with its products in bfloat16 against the same step without.
    """
    world = default_world()
    generation = _generation(omni, world.requests(BATCH, seed=1))
    gated, plain, halved = _steps(omni, world.training_examples(BATCH, 1))
    precisions = {}
    if omni.dtype == torch.float32:
        precisions["precision"] = time_ratio(("bfloat16", "float32"), (halved, gated), repeats, omni.device)
    return {
        "device": str(omni.device),
        "torch_threads": torch.get_num_threads(),
        "help_seconds": round(min(seconds(_help) for _ in range(3)), 3),
        "generation": time_ratio(("gated", "plain"), generation, repeats, omni.device, GENERATION),
        "training_step": time_ratio(("casa", "peft"), (gated, plain), repeats, omni.device, STEP),
        **precisions,
    }


def _help() -> None:
    subprocess.run([sys.executable, "-m", "casa_mech", "--help"], check=True, stdout=subprocess.DEVNULL)


def _generation(omni: Omni, queries: list[Query]) -> tuple[Side, Side]:
    """(gated, plain) generation of as many tokens, whatever the model would say."""
    base = load_omni(omni.source, device=str(omni.device), dtype=str(omni.dtype))
    casa = Casa.attach(omni, CasaConfig())
    settings = GenerationSettings(max_new_tokens=REPLY_TOKENS, batch_size=BATCH)

    for model in (omni.model, base.model):
        model.generation_config.eos_token_id = None
    # The plain side carries neither LoRA nor gate: the ratio is the whole price of the defence.
    return lambda: casa.generate(queries, settings), lambda: base.generate(queries, settings)


def _steps(omni: Omni, examples: list[Example]) -> tuple[Side, Side, Side]:
    """(CASA, plain peft, CASA in bfloat16) training steps on one batch."""
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

    def halved() -> None:
        with bfloat16_products(casa.omni):
            gated()

    return gated, plain, halved
