"""A probe's own threshold on shifted surfaces: the ranking survives it, the threshold does not."""

import numpy as np
import pandas as pd
import pytest
from helpers.activations import activations

from probes.activations import Activations
from probes.linear.thresholds import (
    AS_IT_IS,
    BENIGN_FLAGGED,
    HARMFUL_FLAGGED,
    MOVED,
    RANKING,
    carried_scores,
    threshold_table,
)

TOPICS, EACH, WIDTH = 40, 5, 6
HARMFUL = np.repeat(np.arange(TOPICS) % 2 == 0, EACH)
NAMES = np.repeat([f"t{number}" for number in range(TOPICS)], EACH)


def table_of(data: Activations) -> pd.DataFrame:
    return threshold_table(carried_scores(data))


def apart(seed: int = 0) -> np.ndarray:
    """States whose classes lie at +2 and -2 of the first axis, with noise 0.5: never nearer than they are wide."""
    states = 0.3 * np.random.default_rng(seed).standard_normal((len(NAMES), WIDTH))
    states[:, 0] += np.where(HARMFUL, 2, -2)
    return states


def test_a_shift_takes_the_threshold_away_and_not_the_ranking() -> None:
    shift = np.zeros(WIDTH)
    shift[0] = -5.0  # both classes below the threshold
    table = table_of(activations({"text": apart(), "image": apart(1) + shift, "audio": apart(2) - shift},
                                        HARMFUL, NAMES))  # fmt: skip
    cells = table.set_index(["surface", "states", "measure"])["value"]
    assert cells["text", AS_IT_IS, HARMFUL_FLAGGED] == 1 and cells["text", AS_IT_IS, BENIGN_FLAGGED] == 0
    assert cells["image", AS_IT_IS, HARMFUL_FLAGGED] == 0 == cells["image", AS_IT_IS, BENIGN_FLAGGED]
    assert cells["audio", AS_IT_IS, HARMFUL_FLAGGED] == 1 == cells["audio", AS_IT_IS, BENIGN_FLAGGED]
    for surface in ("image", "audio"):
        assert cells[surface, AS_IT_IS, RANKING] == 1
        assert cells[surface, MOVED, HARMFUL_FLAGGED] == 1 and cells[surface, MOVED, BENIGN_FLAGGED] == 0
    assert ("text", MOVED, RANKING) not in cells.index
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    counts = table.set_index("measure")["n"]
    assert set(counts[HARMFUL_FLAGGED]) == set(counts[BENIGN_FLAGGED]) == {len(NAMES) // 2}
    assert set(counts[RANKING]) == {len(NAMES)}


def test_the_mean_is_moved_without_labels() -> None:
    """A surface with no harm in its states is not made harmful by its labels: half of it is flagged whatever it is."""
    rng = np.random.default_rng(3)
    blind = 2 * rng.standard_normal((len(NAMES), WIDTH)) + 9
    table = table_of(activations({"text": apart(), "image": blind}, HARMFUL, NAMES))
    cells = table.set_index(["surface", "states", "measure"])["value"]
    for measure in (HARMFUL_FLAGGED, BENIGN_FLAGGED):
        assert cells["image", MOVED, measure] == pytest.approx(0.5, abs=0.15)
    other = activations({"text": apart(), "image": blind}, HARMFUL, NAMES)
    other.index.loc[len(NAMES) :, "label"] = "benign"  # the corrected states do not depend on the labels there
    other.index.loc[len(NAMES), "label"] = "harmful"
    again = table_of(other).set_index(["surface", "states", "measure"])
    flagged = [
        again.loc[("image", MOVED, measure), "value"] * again.loc[("image", MOVED, measure), "n"]
        for measure in (HARMFUL_FLAGGED, BENIGN_FLAGGED)
    ]
    before = sum(cells["image", MOVED, measure] for measure in (HARMFUL_FLAGGED, BENIGN_FLAGGED)) * len(NAMES) / 2
    assert sum(flagged) == pytest.approx(before)
