"""Reading every depth: nnsight's extraction against a bare forward, and against TransformerLens's `run_with_cache`.

All sides are the same weights in one process and take turns on the same batch.
"""

from __future__ import annotations

from typing import Any

import torch

from casa_mech.omni import Omni, OmniBatch
from casa_mech.organism.world import default_world
from casa_mech.timing.paired import BATCH, Side, time_ratio
from casa_mech.trace import capture

SLOWDOWN = 1 / 0.95
"""Most that extraction may take of a bare forward's time: 0.95 of its throughput."""
SHARE_OF_LENS = 1 / 2
"""Most that extraction may take of `run_with_cache`'s time: twice its throughput."""


def measure_extraction(omni: Omni, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Seconds and ratios of extraction at every depth and the final norm, at the last position.

    Returns:
        `extraction_bare`: against a forward of the Hugging Face model that keeps nothing. `extraction_lens`: against
        `run_with_cache` as it is called by default, which keeps every hook. `extraction_lens_filtered`: against it
        asked for the same sites and the last position alone, the most favourable call there is. Each holds both
        medians and their `ratio`, the first two also the ratio that is `allowed`.
    """
    batch = omni.encode(default_world().requests(BATCH, seed=1), prefill=False)
    lens, filtered = _lens_sides(omni, batch)
    return {
        "extraction_bare": _measured("bare", omni, batch, _bare(omni, batch), repeats, SLOWDOWN),
        "extraction_lens": _measured("lens", omni, batch, lens, repeats, SHARE_OF_LENS),
        "extraction_lens_filtered": _measured("filtered", omni, batch, filtered, repeats, None),
    }


def _measured(
    name: str, omni: Omni, batch: OmniBatch, other: Side, repeats: int, allowed: float | None
) -> dict[str, float]:
    sites = ["embeddings", *range(omni.n_layers), "norm"]

    def extract() -> object:
        return capture(omni, batch, sites, "last")

    return time_ratio(("nnsight", name), (extract, other), repeats, omni.device, allowed)


def _bare(omni: Omni, batch: OmniBatch) -> Side:
    def forward() -> object:
        with torch.no_grad():
            return omni.model(**batch.inputs, use_cache=False)

    return forward


def _lens_sides(omni: Omni, batch: OmniBatch) -> tuple[Side, Side]:
    from probes.lens.logit import depth_sites
    from probes.lens.transformer_bridge import bridge, hook_name

    model = bridge(omni)
    rest: dict[str, Any] = {**batch.inputs, "use_cache": False}
    ids = rest.pop("input_ids")
    names = [hook_name(site) for site in [*depth_sites(omni.n_layers), "norm"]]

    def everything() -> object:
        with torch.no_grad():
            return model.run_with_cache(ids, **rest)

    def filtered() -> object:
        with torch.no_grad():
            return model.run_with_cache(ids, names_filter=names, pos_slice=-1, **rest)

    return everything, filtered
