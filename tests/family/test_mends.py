"""Ways to mend a gate: every one is an option of `Casa`, and none is calibrated on what is audited."""

import pytest

from casa_mech.casa import Casa, CasaConfig, InferenceSettings
from casa_mech.compare.sets import WorldSets
from casa_mech.family.mends import MENDS, Mend
from casa_mech.omni import Omni, load_omni
from casa_mech.organism.premise_rows import SURFACES
from casa_mech.queries import Query


@pytest.fixture(scope="module")
def omni() -> Omni:
    return load_omni("organism", device="cpu", dtype="float32")


def test_each_changes_one_thing_and_the_last_all_of_them() -> None:
    *single, mended, everything = MENDS.values()
    assert mended.name == "mended" and everything.name == "all together"
    for mend in single:
        changed = [bool(mend.training), bool(mend.inference), mend.benign != "plain"]
        assert sum(changed) == 1, mend.name
        assert mend.trains == (not mend.inference)
    used = {option for mend in single for option in (*mend.training, *mend.inference)} - {"fpr_by_surface"}
    assert {*everything.training, *everything.inference} == used and everything.benign == "varied"
    assert CasaConfig(**mended.training, **mended.inference) == CasaConfig.mended()
    assert set(InferenceSettings.model_fields).isdisjoint(everything.training)


def test_calibration_requests_are_none_of_the_audited(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def calibrate(self: Casa, queries: list[Query], **others: list[Query]) -> None:
        used.extend(query.id for group in (queries, *others.values()) for query in group)
        assert {query.label for query in others["benign"]} == {"benign"}

    monkeypatch.setattr(Casa, "calibrate", calibrate)
    casa = Casa.attach(omni, CasaConfig())
    try:
        MENDS["re-centred"].apply(casa, 6, 0)
    finally:
        casa.detach()
    sets = WorldSets(tuple(SURFACES.values()), 6)
    audited = {query.id for cell in sets.cells() for query in sets.queries(cell, 0, omni)}
    assert used and audited and audited.isdisjoint(used)


@pytest.mark.parametrize("mend", MENDS.values(), ids=lambda mend: mend.name)
def test_each_can_be_switched_on(omni: Omni, mend: Mend) -> None:
    casa = Casa.attach(omni, CasaConfig(**mend.training))
    try:
        mend.apply(casa, 8, 0)
        used = casa.config.inference.model_dump()
        assert {name: used[name] for name in mend.inference} == dict(mend.inference)
        assert used == {**InferenceSettings().model_dump(), **mend.inference}
    finally:
        casa.detach()
