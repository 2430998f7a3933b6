"""What a sweep over prefills costs: one forward over the longest, against a forward for each length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from casa_mech.omni import Omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.timing.paired import BATCH, time_ratio
from casa_mech.trace.sites import Site
from probes.linear.refusal_direction import opening_ids
from probes.prefill.sweep import AttackedModel, compliance_ids, prefill_sweep

LENGTHS = tuple(range(13))
ALLOWED = 1 / 3
"""The sweep's share of the seconds of separate forwards that it may take."""


def measure_prefill(omni: Omni, repeats: int = 5) -> dict[str, Any]:
    """Median seconds and their ratio, sweep over separate, for 16 requests and prefills of 0 to 12 tokens.

    Both sides end with the same numbers: the last position's states at every depth, the probability of a refusal's
    opening and the KL from no prefill, for each length. The separate side is a plain Hugging Face forward with
    `output_hidden_states`, a length at a time, which costs less than a generation would.
    """
    queries = default_world().requests(BATCH, seed=1, label="harmful")
    sides = prefill_sides(omni, queries)
    return {"prefill_sweep": time_ratio(("sweep", "separate"), sides, repeats, omni.device, ALLOWED)}


def prefill_sides(
    omni: Omni, queries: Sequence[Query], lengths: Sequence[int] = LENGTHS
) -> tuple[Callable[[], dict[str, torch.Tensor]], Callable[[], dict[str, torch.Tensor]]]:
    """(one sweep, separate forwards), each giving `states` [depth, query, length, d_model] (embeddings first, the final
    norm last), `opening` and `kl` [query, length], on the CPU."""
    openings = opening_ids(omni, default_world().refusals).tolist()
    system = AttackedModel("pretrained", omni)
    # Hugging Face gives the last block's output behind the final norm only.
    sites: list[Site] = ["embeddings", *range(omni.n_layers - 1), "norm"]

    def sweep() -> dict[str, torch.Tensor]:
        along = prefill_sweep(system, queries, lengths, openings, sites, batch_size=len(queries))
        states = torch.stack([torch.from_numpy(values) for values in along.states.values()])
        return {"states": states, "opening": torch.from_numpy(along.opening), "kl": torch.from_numpy(along.kl)}

    def separate() -> dict[str, torch.Tensor]:
        answers = compliance_ids(omni, queries, max(lengths))
        states, log_p = [], []
        for length in lengths:
            batch = omni.encode(queries, [ids[:length] for ids in answers], prefill=False)
            with torch.no_grad():
                result = omni.model(**batch.inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            states.append(torch.stack([hidden[:, -1] for hidden in result.hidden_states]).float().cpu())
            log_p.append(torch.log_softmax(result.logits[:, -1].float(), dim=-1).cpu())
        whole = torch.stack(log_p, dim=1)
        kl = (whole.exp() * (whole - whole[:, :1])).sum(dim=-1)
        return {"states": torch.stack(states, dim=2), "opening": whole[..., openings].exp().sum(dim=-1), "kl": kl}

    return sweep, separate
