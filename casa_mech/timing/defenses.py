"""What the decoding-time defences cost: each against plain generation of as many tokens, the two taking turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from casa_mech.attacks.registry import apply_attack
from casa_mech.defenses import load_defense
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.timing.paired import REPLY_TOKENS, Side, time_ratio

ALLOWED: Mapping[str, float] = {"coca": 2.2, "safecode": 2.5}
"""How many times the seconds of plain generation each may take."""
SIDES = ("coca", "safecode", "moras")
SURFACES = ("plain", "image", "audio")


def measure_defenses(omni: Omni, repeats: int = 5, batch_sizes: tuple[int, ...] = (16, 64)) -> dict[str, Any]:
    """Median seconds and ratios of each decoding-time defence, for each surface and batch size.

    Both sides answer the same queries with exactly `REPLY_TOKENS` tokens each, from the same model in the same process;
    what a defence does besides (a verdict, a caption, a probe, noise) is in its time, what it does once (MoRAS's
    prototypes) is not. Plain generation is measured anew for each defence, between its runs.
    """
    defenses = {name: load_defense(name, omni) for name in SIDES}
    # Nothing may end a reply before its length, and so nothing ends MoRAS's captions: its ratio is an upper bound.
    omni.model.generation_config.eos_token_id = None
    requests = default_world().requests(max(batch_sizes), seed=1)
    ratios: list[dict[str, Any]] = []
    for surface in SURFACES:
        queries = apply_attack(surface, requests)
        for size in batch_sizes:
            settings = GenerationSettings(max_new_tokens=REPLY_TOKENS, batch_size=size)
            for name, defense in defenses.items():
                sides = _sides(defense.generate, omni.generate, queries[:size], settings)
                ratio = time_ratio((name, "plain"), sides, repeats, omni.device, ALLOWED.get(name))
                ratios.append({"defense": name, "surface": surface, "batch": size, **ratio})
    return {"ratios": ratios}


def _sides(
    defended: Callable[..., object], plain: Callable[..., object], queries: list[Query], settings: GenerationSettings
) -> tuple[Side, Side]:
    return lambda: defended(queries, settings), lambda: plain(queries, settings)
