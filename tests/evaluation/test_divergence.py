"""The divergence of a trained defence from the base model."""

import numpy as np
import pytest
import torch

from casa_mech.casa import Casa
from casa_mech.errors import InputError
from casa_mech.evaluation.divergence import benign_kl_row, kl_to_base
from casa_mech.judging.results import result_table
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import Query


def test_a_gate_that_changes_nothing_has_nearly_no_divergence(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    casa = Casa.attach(tiny_omni)
    settings = GenerationSettings(max_new_tokens=3, batch_size=3)
    before = kl_to_base(casa, mixed_queries, settings)
    assert len(before) == 4 and all(0 <= value < 0.5 for value in before), "the safety token stands before the reply"
    with torch.no_grad():
        for name, weight in tiny_omni.model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    after = kl_to_base(casa, mixed_queries, settings)
    assert np.mean(after) > 2 * np.mean(before)
    row = benign_kl_row(casa, mixed_queries, defense="CASA", settings=settings)
    assert row["metric"] == "benign_kl" and row["value"] == pytest.approx(np.mean(after)) and row["n"] == 4
    result_table([row])
    with pytest.raises(InputError, match="query 'text' has a prefill"):
        kl_to_base(casa, [mixed_queries[0].model_copy(update={"prefill": "sure"})])
