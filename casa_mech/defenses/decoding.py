"""What the decoding-time defences share: queries in batches of similar length, and ids turned into replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query, Reply


def decoded_replies(
    omni: Omni,
    queries: Sequence[Query],
    settings: GenerationSettings,
    progress: bool,
    decode: Callable[[list[int]], Sequence[Sequence[int]]],
    name: str,
) -> list[Reply]:
    """A reply to each query, in their order, batched and seeded as `Omni.generate` does it.

    `decode` takes the indices of the queries of one batch and gives the ids that the model wrote for each.
    """
    replies: dict[int, Reply] = {}
    with (
        torch.no_grad(),
        torch.random.fork_rng(),
        tqdm(total=len(queries), disable=not progress, desc=name, unit="query") as bar,
    ):
        torch.manual_seed(settings.seed)
        for group in omni.batches(queries, settings.batch_size):
            began = time.perf_counter()
            rows = decode(group)
            seconds = (time.perf_counter() - began) / len(group)
            for index, row in zip(group, rows, strict=True):
                ids = omni.until_end(row)
                replies[index] = Reply(
                    query_id=queries[index].id, text=omni.decode(ids), tokens=len(ids), seconds=seconds
                )
            bar.update(len(group))
    return [replies[index] for index in range(len(queries))]
