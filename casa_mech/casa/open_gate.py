"""The trained gate opened up: its numbers with their gradient, and v_s where a probability no longer tells apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor

from casa_mech.casa.casa import Casa
from casa_mech.casa.rules import rewrite
from casa_mech.trace.gate import GateReading


@dataclass(frozen=True)
class OpenReading(GateReading):
    """A reading whose numbers have a gradient."""

    surrogate: Tensor
    """Stands in for the difference of the rewritten logits, where these are flat [batch]."""
    log_odds: Tensor
    """The logit of v_s [batch]."""


class OpenGate:
    """A trained gate with the logit of v_s, and with gradients that reach the prompt's states.

    It gives the same numbers otherwise: what an attacker with the weights sees, and what an analysis of the gate needs.
    Training detaches these states, and rule `add_log` clamps v_s: both would hide the way in, not close it. For it the
    surrogate is the difference of the raw logits plus the logit of v_s, unclamped; for other rules the difference.
    """

    def __init__(self, casa: Casa) -> None:
        gate = casa.safety_gate
        self.layer = gate.layer
        self.mask = gate.mask
        self.token_ids = gate.token_ids
        self._attention, self._rule = gate.attention, casa.config.rule

    def __call__(self, states: Tensor, mask: BoolTensor, logits: Tensor) -> tuple[Tensor, OpenReading]:
        """As `SafetyGate`: states [batch, position, d_model], mask, logits [batch, vocab] → new logits, reading."""
        none = torch.zeros_like(mask, dtype=torch.float32)
        raw = logits[:, self.token_ids].to(torch.promote_types(logits.dtype, torch.float32))
        apart = raw[:, 1] - raw[:, 0]
        if self._attention is None:
            return logits, OpenReading(torch.sigmoid(apart), raw, raw, none, apart, apart)
        log_odds = self._attention.log_odds(states, mask)
        v_s = torch.sigmoid(log_odds)
        logits, raw, pair = rewrite(self._rule, logits, self.token_ids, v_s)
        surrogate = apart + log_odds if self._rule == "add_log" else pair[:, 1] - pair[:, 0]
        return logits, OpenReading(v_s, pair, raw, none, surrogate, log_odds)
