"""The first positions of a reply, traced: the states that the head reads, and its logits when they are changed.

Only these positions are traced. The prompt's cache goes from step to step, and whoever decodes on gets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import LongTensor, Tensor

from casa_mech.omni import Omni
from casa_mech.trace.fork import Start, unread

StepEdit = Callable[[int, Tensor], Tensor]
"""(position from 0, states [batch, d_model] after the final norm) → states [batch, d_model] for the head."""
Pick = Callable[[Tensor], LongTensor]
"""Logits [batch, vocab] → ids [batch]."""


@dataclass(frozen=True)
class FirstSteps:
    """The first `step` positions of each reply."""

    ids: LongTensor
    """[batch, step]."""
    states: Tensor
    """[batch, step, d_model] after the final norm, before any edit."""
    cache: Any
    """Keys and values of the prompt and of all ids but the last, for decoding on."""


def first_steps(
    omni: Omni, start: Start, steps: int, pick: Pick | None = None, edit: StepEdit | None = None
) -> FirstSteps:
    """Decode `steps` tokens, each from the state that `edit` makes of the final-norm state at its position.

    Args:
        omni: the model.
        start: a batch's inputs, or prompts of which a part was read before; a prefill is part of them, so positions are
            counted from the first token of the model's own.
        steps: how many.
        pick: chooses tokens; greedy when left out.
        edit: what the head reads instead; nothing is changed when left out.
    """
    pick, edit = pick or _likeliest, edit or _unchanged
    inputs, mask = unread(omni, start), start["attention_mask"]
    ids, states = [], []
    with torch.no_grad():
        for step in range(steps):
            state, logits, cache = _step(omni, inputs, step, edit)
            token = pick(logits.float())
            ids.append(token)
            states.append(state)
            mask = torch.cat([mask, mask.new_ones(len(token), 1)], dim=1)
            inputs = {
                "input_ids": token[:, None],
                "attention_mask": mask,
                "position_ids": omni.text_positions(mask)[..., -1:],
                "past_key_values": cache,
            }
    return FirstSteps(torch.stack(ids, dim=1), torch.stack(states, dim=1), cache)


def _step(omni: Omni, inputs: dict[str, Any], step: int, edit: StepEdit) -> tuple[Tensor, Tensor, Any]:
    model, norm, head = omni.nnsight, omni.envoy("norm"), omni.envoy("head")
    with model.trace(**inputs, use_cache=True):
        state = norm.output[:, -1]
        # The head is given the one position that is needed, so its [batch, position, vocab] output never exists.
        head.input = edit(step, state).unsqueeze(1)
        logits = nnsight.save(head.output[:, 0])
        state = nnsight.save(state)
        cache = nnsight.save(model.output.past_key_values)
    return state, logits, cache


def _likeliest(logits: Tensor) -> LongTensor:
    return logits.argmax(dim=-1)


def _unchanged(_: int, state: Tensor) -> Tensor:
    return state
