"""CASA as one defence among others (arXiv 2604.00310; docs/method.md §1), and with options beyond the paper (§1.10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field

from casa_mech.casa import Casa, InferenceSettings
from casa_mech.casa.calibration import prompts_by_use
from casa_mech.casa.config import Form, Rule
from casa_mech.casa.trainer import Row
from casa_mech.defenses.safety_token import SafetyTokenDefense, SafetyTokenSettings
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.limits import GREATEST_SEED
from casa_mech.omni import Omni
from casa_mech.queries import Example, Query
from casa_mech.queries.files import QuerySource, read_files

CALIBRATION_ATTACKS = ("plain", "image", "audio", "split")
"""The attacks that put the micro-world's calibration requests on the surfaces text, image, audio and image+audio."""


class CasaSettings(SafetyTokenSettings):
    """How a trained CASA is used. Form and rule belong to its training; naming them makes sure of them.

    The options at inference are those of `InferenceSettings`; None leaves them as the gate was saved.
    """

    form: Form | None = None
    """The form of safety attention that the gate must have; None takes any."""
    rule: Rule | None = None
    """The logit rule that the gate must have; None takes any."""
    recentre: bool | None = None
    """Shift what the gate reads of a surface onto text's mean."""
    rescale: bool | None = None
    """After re-centring, stretch it to text's spread along text's difference of means."""
    fpr: float | None = Field(default=None, ge=0, lt=1)
    """False-positive rate on benign calibration prompts that sets the threshold; 0 takes the likelier token."""
    fpr_by_surface: bool | None = None
    """Set it on each surface's own benign prompts, where there are some."""
    drop_after_safe: bool | None = None
    """Leave safe replies to the base model."""
    recheck_every: int | None = Field(default=None, ge=0)
    """Decide again after so many tokens of a reply; 0: decide once."""
    inference_rule: Rule | None = None
    """How v_s changes the logits at inference, where that is not the rule of training."""
    calibration: tuple[QuerySource, ...] = ()
    """Queries to calibrate on in the place of what the gate was saved with: text and media; those labelled benign set
    the threshold, text of both labels the direction. Empty: the gate's own calibration, else the micro-world's."""
    n_calibration: int = Field(default=50, ge=2)
    """Requests of each label and surface to take from the micro-world."""
    seed: int = Field(default=0, ge=0, le=GREATEST_SEED)
    """Of the micro-world's requests."""

    @property
    def changes(self) -> dict[str, object]:
        """The fields of `InferenceSettings` that are given."""
        values = {name: getattr(self, name) for name in InferenceSettings.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class CasaDefense(SafetyTokenDefense):
    """Safety tokens, safety attention and a LoRA."""

    name = "casa"
    source = "CASA, arXiv 2604.00310"
    settings_type = CasaSettings

    @classmethod
    def load(cls, omni: Omni, path: Path, settings: SafetyTokenSettings) -> Self:
        """A saved gate on `omni`, calibrated where its options need that.

        Raises:
            InputError: it was trained with another form or rule than `settings` name, or needs a calibration and there
                is nothing to calibrate on.
        """
        assert isinstance(settings, CasaSettings)
        casa = Casa.from_pretrained(path, omni)
        try:
            for name in ("form", "rule"):
                wanted, trained = getattr(settings, name), getattr(casa.config, name)
                if wanted not in (None, trained):
                    raise InputError(
                        f"{path} was trained with {name} {trained}, not {wanted}: train one with {name}={wanted}"
                    )
            casa.use(**settings.changes)
            calibrate(casa, settings)
        except BaseException:
            casa.detach()
            raise
        return cls(casa, settings)

    def train(
        self, examples: Sequence[Example], out: Path | None = None, resume: bool = False, progress: bool = True
    ) -> list[Row]:
        """As `Casa.train`; on the micro-world a gate whose options need it is calibrated then, on requests of its own.

        For any other model, calibrate it with `Casa.calibrate`, `casa-mech calibrate` or the option `calibration`.
        """
        log = super().train(examples, out, resume, progress)
        if self.omni.speaks_micro_world:
            calibrate(self.casa, CasaSettings(seed=self._training_settings.seed))
        return log


class CasaMended(CasaDefense):
    """CASA with the options beyond the paper that `CasaConfig.mended` switches on."""

    name = "casa-mended"
    source = "CASA, arXiv 2604.00310, with the options of docs/method.md §1.10"


def calibrate(casa: Casa, settings: CasaSettings) -> None:
    """Calibrate a gate whose options need it, on the queries that `settings` name.

    Raises:
        InputError: it needs a calibration, has none, and there are neither such queries nor a micro-world to draw from.
    """
    inference = casa.config.inference
    if settings.calibration:
        queries = [query for source in settings.calibration for query in read_files(source)]
    elif not casa.calibration.lacks(inference):
        return
    elif casa.omni.speaks_micro_world:
        queries = world_prompts(settings.n_calibration, Draw.CALIBRATION + settings.seed)
    else:
        raise InputError(f"{casa.calibration.lacks(inference)}, or set the option calibration to queries of your own")
    benign, labelled = prompts_by_use(queries)
    casa.calibrate(queries, benign=benign, labelled=labelled)


def world_prompts(n: int, seed: int) -> list[Query]:
    """`n` harmful and `n` benign requests of the micro-world on each surface, of seen topics in seen phrasings."""
    from casa_mech.attacks.registry import apply_attack
    from casa_mech.organism.wording import MICRO_WORLD
    from casa_mech.organism.world import default_world

    plain = default_world().requests(2 * n, seed, None, "seen", "seen")
    return [query for attack in CALIBRATION_ATTACKS for query in apply_attack(attack, plain, seed, wording=MICRO_WORLD)]
