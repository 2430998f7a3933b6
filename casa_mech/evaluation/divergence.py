"""The cost of a trained defence on benign prompts: how far the distribution of replies moves from the base model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from casa_mech.casa import Casa
from casa_mech.defenses.base import Defense
from casa_mech.defenses.casa import CasaDefense
from casa_mech.defenses.ssft import SsftToken
from casa_mech.defenses.trained import Tuned
from casa_mech.divergence import kl_from_logits
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.results import Row, value_row
from casa_mech.judging.stats import cluster_of
from casa_mech.omni import GenerationSettings, with_system
from casa_mech.queries import Query
from casa_mech.trace.replies import reply_logits


def kl_to_base(
    system: Casa | Defense, queries: Sequence[Query], settings: GenerationSettings = GenerationSettings()
) -> list[float]:
    """The mean over a reply's tokens of KL(base ‖ system) for each query, in nats.

    The reply is the base model's own, greedy, and ends with the end of the turn; both systems are asked for the next
    token after each of its beginnings. A gate decides first, and its safety token stands before the reply, as in
    generation.

    Args:
        system: a gate, or a defence that is one or that has changed weights only: casa, ssft, ssft-token,
            circuit-breaker.
        queries: plain ones. settings: how the base model's replies are generated.

    Raises:
        InputError: no queries, one with a prefill, before or after which the token could stand, or another defence.
    """
    system = _measurable(system)
    if not queries:
        raise InputError("there are no queries to measure a divergence on: give at least one")
    prefilled = next((query.id for query in queries if query.prefill), None)
    if prefilled is not None:
        raise InputError(f"query {prefilled!r} has a prefill: the divergence is measured on plain benign prompts")
    queries = with_system(queries, settings.system)
    omni, divergences = system.omni, [0.0] * len(queries)
    greedy = settings.model_copy(update={"do_sample": False})
    with system.disabled():
        replies = omni.generate(queries, greedy)
    for places in omni.batches(queries, settings.batch_size):
        group = [queries[place] for place in places]
        targets = [omni.reply_ids(replies[place].text) for place in places]
        for place, value in zip(places, _divergences(system, group, targets, greedy), strict=True):
            divergences[place] = value
    return divergences


def benign_kl_row(
    system: Casa | Defense, queries: Sequence[Query], *, defense: str, attack: str = "none", surface: str = "text",
    seed: int = 0, settings: GenerationSettings = GenerationSettings(),
) -> Row:  # fmt: skip
    """`benign_kl` in the result schema: the mean of `kl_to_base` in nats, with a bootstrap over clusters."""
    values = kl_to_base(system, queries, settings)
    estimate = mean_interval(values, [cluster_of(query) for query in queries], seed)
    return value_row(
        model=system.omni.source, defense=defense, attack=attack, surface=surface, label="benign", metric="benign_kl",
        seed=seed, n=len(values), **estimate._asdict(),
    )  # fmt: skip


def _measurable(system: Casa | Defense) -> Casa | Tuned:
    """The part of `system` that can be switched off and decodes plainly after at most one token of its own.

    Raises:
        InputError: a defence that has none.
    """
    if isinstance(system, Casa):
        return system
    if isinstance(system, Tuned) and not system.safety_prompt:
        return system
    # A refusal token is chosen by a threshold, not by the gate, and a hard gate does not decode.
    if isinstance(system, CasaDefense | SsftToken) and not (system.safety_prompt or system.settings.hard):
        return system.casa
    raise InputError(
        f"the defence {system.label!r} changes more than the weights and the first token: a divergence is measured for "
        "casa, ssft, ssft-token and circuit-breaker, without a safety prompt or a hard gate"
    )


@torch.no_grad()
def _divergences(
    system: Casa | Tuned, group: list[Query], targets: list[list[int]], settings: GenerationSettings
) -> list[float]:
    """The mean KL of each query of a batch, over the tokens of its reply `targets`."""
    omni, own = system.omni, 0
    with system.disabled():
        base = reply_logits(omni, omni.encode(group, targets))
    if isinstance(system, Casa):
        tokens = [system.token_ids[reply.safety_token == "unsafe"] for reply in system.decide(group, settings)]
        # The first logits are then those of the safety token, which the base model does not write.
        targets, own = [[token, *target] for token, target in zip(tokens, targets, strict=True)], 1
    changed = reply_logits(omni, omni.encode(group, targets))
    pairs = [(_widened(one, other.shape[1]), other[own:]) for one, other in zip(base, changed, strict=True)]
    return [float(kl_from_logits(one, other).mean()) for one, other in pairs]


def _widened(logits: Tensor, vocab: int) -> Tensor:
    """Logits [position, vocab] over a vocabulary that the safety tokens made larger; the base model never says them."""
    return torch.nn.functional.pad(logits, (0, vocab - logits.shape[1]), value=-torch.inf)
