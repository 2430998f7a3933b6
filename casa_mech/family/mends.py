"""Ways to mend a gate: what each changes in the training and what it switches on when the gate answers.

`MENDS` is the one place that names them. A mend that changes neither examples nor options of training is a use of the
gate that is trained as in the paper, and needs no training of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from casa_mech.casa import Casa
from casa_mech.draws import BENIGN, Draw
from casa_mech.organism.premises import varied_training_examples
from casa_mech.organism.world import default_world
from casa_mech.queries import Example

FALSE_POSITIVES = 0.05
CALIBRATION = 300
"""Benign plain requests that a threshold is set on; none of them is audited."""


@dataclass(frozen=True)
class Mend:
    """One way to mend a gate."""

    name: str
    """In tables."""
    examples: Callable[[int, int], Sequence[Example]] | None = None
    """From a number and a seed to the training examples; None: those of the gate of the paper."""
    training: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options of training (fields of `CasaConfig` and `TrainSettings`)."""
    use: Callable[[Casa, int], Mapping[str, Any]] | None = None
    """From the trained gate and a seed to options of `Casa.generate`; None: as in the paper."""

    @property
    def key(self) -> dict[str, Any]:
        """What its training depends on, beside its name, as JSON values."""
        return {"training": dict(self.training)}

    @property
    def trains(self) -> bool:
        """True for a mend that needs a training of its own."""
        return self.examples is not None or bool(self.training)


def varied_benign_examples(n: int, seed: int) -> Sequence[Example]:
    """Benign data of all tasks with several answers, harmless uses of harmful words among them."""
    return varied_training_examples(default_world(), n, Draw.TRAINING + seed)


def text_threshold(casa: Casa, seed: int) -> Mapping[str, Any]:
    """The unsafe token's share of the pair above which it is taken, so that `FALSE_POSITIVES` of benign text is."""
    requests = default_world().requests(CALIBRATION, Draw.PROBING + BENIGN + seed, "benign", templates="held_out")
    replies = casa.decide(requests)
    odds = np.array([(reply.logit_unsafe or 0.0) - (reply.logit_safe or 0.0) for reply in replies])
    return {"threshold": float(1 / (1 + np.exp(-np.quantile(odds, 1 - FALSE_POSITIVES))))}


MENDS: Mapping[str, Mend] = MappingProxyType(
    {
        mend.name: mend
        for mend in (
            Mend("varied benign data", examples=varied_benign_examples),
            Mend("threshold at 5 % false positives", use=text_threshold),
        )
    }
)
"""Each alone, and all together."""
