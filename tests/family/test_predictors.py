"""Predictors: the card's own rows, and what is measured beside them."""

import pytest

from casa_mech.family.predictors import PREDICTOR_COLUMNS, predictor_table
from casa_mech.omni import Omni, load_omni
from casa_mech.organism.premise_rows import READ_SURFACES, SURFACES


@pytest.fixture(scope="module")
def organism() -> Omni:
    return load_omni("organism", device="cpu", dtype="float32")


def test_the_card_is_read_and_only_what_it_lacks_is_measured(organism: Omni) -> None:
    row = {"n": 7, "value": 0.5, "low": 0.4, "high": 0.6}
    card = {
        "rows": [{"measure": "attack_success", "surface": "image", "split": "seen", **row}],
        "premises": [
            {"measure": "attack_success", "surface": "image", "split": "seen", **row, "threshold": [0.6, 0.95]},
            {"measure": "names", "surface": "image", "split": "seen", **row, "threshold": [0.95, 1]},
            *(
                {"measure": measure, "surface": surface, "split": "held_out", **row, "threshold": None}
                for measure in ("probe", "probe_from_text")
                for surface in READ_SURFACES
            ),
        ],
    }
    table = predictor_table(organism, card, 60, 0)
    assert tuple(table.columns) == PREDICTOR_COLUMNS
    places = table.set_index(["measure", "surface"])
    assert len(places) == len(places.index.unique()) == 1 + 2 * len(SURFACES) + 2 * len(SURFACES)
    assert places.loc[("probe", "image"), "n"] == 7 and places.loc[("attack_success", "image"), "value"] == 0.5
    # The card has no probe under a jailbreak: fitted here on half of the requests, read on the other half.
    assert places.loc[("probe", "jailbreak"), "n"] == 30 and places.loc[("probe_from_text", "jailbreak"), "value"] > 0.6
    assert places.loc[("cosine", "text"), "value"] == pytest.approx(1)
    assert "names" not in set(table["measure"])
