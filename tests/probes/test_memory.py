"""Activations from arrays, from a bare index and from texts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import probes
from casa_mech.errors import InputError
from casa_mech.omni import Omni
from casa_mech.queries import Query
from probes import Activations, transfer_matrix
from probes.linear import controls, plot_probes


def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    return rng.standard_normal((60, 5)) + labels[:, None], labels


def test_arrays_are_enough_for_every_probe() -> None:
    states, labels = _data()
    groups = np.arange(60) // 3
    for arrays in (states, states[None], {"0": states}):
        found = Activations.from_arrays(arrays, labels, groups)
        assert found.sites == ("0",) and found.at("0").dtype == np.float32
        assert found.topics.tolist() == [str(group) for group in groups]
        np.testing.assert_array_equal(found.harmful, labels == 1)
    matrix = transfer_matrix(found, deals=9)
    assert 0.7 < matrix["auroc"].item() <= 1
    assert controls(found, deals=9)["length"].isna().all()
    assert Activations.from_arrays(states, ["unsafe", "harmless"] * 30).harmful.sum() == 30
    assert len(set(Activations.from_arrays(states, labels).topics)) == 60


def test_an_index_may_lack_columns() -> None:
    states, labels = _data()
    bare = Activations({"norm": states}, pd.DataFrame({"label": np.where(labels == 1, "unsafe", "safe")}), "last")
    assert len(set(bare.topics)) == 60 and bare.harmful.sum() == 30 and set(bare.index["surface"]) == {""}
    assert len(transfer_matrix(bare, deals=0)) == 1
    named = Activations({"norm": states}, pd.DataFrame({"query_id": ["a", "b"] * 30, "label": labels}))
    assert set(named.topics) == {"a", "b"}


def test_arrays_that_do_not_fit_are_named() -> None:
    states, labels = _data()
    with pytest.raises(InputError, match=r"states at '0' are \[60, 5\]: give \[query, d_model\] with the index's 59"):
        Activations.from_arrays(states, labels[:59])
    with pytest.raises(InputError, match="60 labels but 2 groups"):
        Activations.from_arrays(states, labels, ["a", "b"])
    with pytest.raises(InputError, match="label 'toxic': write harmful or benign"):
        Activations.from_arrays(states, ["toxic"] * 60)


def test_a_transfer_matrix_can_be_drawn() -> None:
    states, labels = _data()
    one = plot_probes(transfer_matrix(Activations.from_arrays(states, labels), deals=0))
    assert len(one.axes) == 1
    index = pd.DataFrame({"label": np.tile(labels, 2), "surface": ["text"] * 60 + ["image"] * 60})
    both = Activations({"norm": np.concatenate([states, states])}, index, "last")
    assert len(plot_probes(transfer_matrix(both, deals=0), "claim").axes) == 2


def test_texts_are_collected(tiny_omni: Omni, tmp_path: object) -> None:
    texts = ["make tea", "how do i make the cake ?"]
    from_text = probes.collect(tiny_omni, texts)
    from_query = probes.collect(tiny_omni, [Query.from_text(text) for text in texts])
    np.testing.assert_array_equal(from_text.stacked(), from_query.stacked())
    pd.testing.assert_frame_equal(from_text.index, from_query.index)
    assert from_text.index["query_id"].is_unique
    store = probes.ActivationStore.collect(tiny_omni, texts, positions="prompt", out=f"{tmp_path}/store")
    assert sorted(store.frame()["query_id"].unique()) == sorted(from_text.index["query_id"])
    with pytest.raises(InputError, match="a single prompt: give a list"):
        probes.collect(tiny_omni, "make tea")
