"""Less memory: blocks computed again in the backward pass, and batches that are halved where they do not fit."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from casa_mech.errors import CasaMechError

Result = TypeVar("Result")
_CPU_WORDS = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch's allocators of processors and of Apple's devices say, whose errors have no class of their own."""


@contextmanager
def recomputed_blocks(model: PreTrainedModel) -> Iterator[None]:
    """For the length of a block, training holds each transformer block's input alone and computes the rest again.

    Gradients are the same, dropout's draws included; the backward pass costs one more forward.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocator's error on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    ours = isinstance(error, CasaMechError)
    return isinstance(error, RuntimeError) and not ours and any(words in str(error).lower() for words in _CPU_WORDS)


def free_memory() -> None:
    """Give back what an attempt that ran out of memory held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say_halved(what: str) -> None:
    """Warn that a batch did not fit; `what` is what is tried next."""
    warnings.warn(f"out of memory: going on with {what} a forward", stacklevel=3)


def in_halves(groups: Iterable[list[int]], work: Callable[[list[int]], Result]) -> Iterator[tuple[list[int], Result]]:
    """Each group with `work` of it; one that does not fit into memory is halved, as are those after it, with a warning.

    A group of one that does not fit raises the allocator's error.
    """
    most = 0
    for group in groups:
        waiting = [group]
        while waiting:
            members = waiting.pop(0)
            if most and len(members) > most:
                waiting[:0] = [members[:most], members[most:]]
                continue
            try:
                result = work(members)
            except (RuntimeError, MemoryError) as error:
                if len(members) == 1 or not is_out_of_memory(error):
                    raise
                most = len(members) // 2
            else:
                yield members, result
                continue
            # Here, since the error's traceback held the attempt's tensors.
            free_memory()
            say_halved(f"{most} quer{'y' if most == 1 else 'ies'}")
            waiting.insert(0, members)
