"""Ways to mend a gate, each alone and all together: what each changes in the training, and what it does at inference.

`MENDS` is the one place that names them. One that changes nothing of the training uses the gate of the paper again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from casa_mech.casa import Casa, InferenceSettings
from casa_mech.casa.calibration import prompts_by_use
from casa_mech.casa.config import MENDED
from casa_mech.defenses.casa import world_prompts
from casa_mech.draws import Draw
from casa_mech.evaluation.training import Benign

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Mend:
    """One way to mend a gate."""

    name: str
    """In tables."""
    benign: Benign = "plain"
    """The benign half of the training examples."""
    training: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    """Options of training, fields of `CasaConfig`, where they differ from the paper's."""
    inference: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    """What `Casa.use` switches on, fields of `InferenceSettings`."""

    @property
    def training_key(self) -> dict[str, Any]:
        """What it changes in the training, as JSON values."""
        return {"benign": self.benign, "training": dict(self.training)}

    @property
    def key(self) -> dict[str, Any]:
        """What it changes, as JSON values."""
        return {"mend": self.name, **self.training_key, "inference": dict(self.inference)}

    @property
    def trains(self) -> bool:
        """True for a mend that needs a training of its own."""
        return self.benign != "plain" or bool(self.training)

    def apply(self, casa: Casa, n: int, seed: int) -> None:
        """Calibrate a trained gate on `n` requests of each label and surface, none of them audited; switch it on."""
        if not self.inference:
            return
        queries = world_prompts(n, Draw.CALIBRATION + seed)
        benign, labelled = prompts_by_use(queries)
        casa.calibrate(queries, benign=benign, labelled=labelled)
        casa.use(**self.inference)


def _part(options: Mapping[str, Any], inference: bool) -> dict[str, Any]:
    """The options that training does not depend on, or the others."""
    return {name: value for name, value in options.items() if (name in InferenceSettings.model_fields) == inference}


_COUNTERFACTUAL = {"counterfactual": MENDED["counterfactual"]}
_ALL = {"recentre": True, "rescale": True, "fpr": 0.05, "drop_after_safe": True, "recheck_every": 8}
MENDS: Mapping[str, Mend] = MappingProxyType(
    {
        mend.name: mend
        for mend in (
            Mend("counterfactual tokens", training=_COUNTERFACTUAL),
            Mend("varied benign data", benign="varied"),
            Mend("re-centred", inference={"recentre": True}),
            Mend("re-centred and rescaled", inference={"recentre": True, "rescale": True}),
            Mend("threshold by text", inference={"fpr": 0.05, "fpr_by_surface": False}),
            Mend("threshold by surface", inference={"fpr": 0.05}),
            Mend("dropped after safe", inference={"drop_after_safe": True}),
            Mend("header again", inference={"recheck_every": 8}),
            Mend("mended", training=_part(MENDED, False), inference=_part(MENDED, True)),
            Mend("all together", benign="varied", training=_COUNTERFACTUAL, inference=_ALL),
        )
    }
)
"""Each alone, those of `CasaConfig.mended`, and all together."""
