"""A study in half precision writes down how far the batch moves its gate; one in float32 has nothing to say."""

from __future__ import annotations

from pathlib import Path

from casa_mech.study import Study
from casa_mech.study.manifest import envelopes_seen

SIZES = {"n_eval": 4, "n_probe": 4, "train_examples": 16, "train_steps": 2, "train_batch": 4, "max_new_tokens": 3}


def test_a_half_precision_run_measures_its_envelope(random_organism: Path, tmp_path: Path) -> None:
    seen = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        study = Study.open(out, model=str(random_organism), profile="smoke", dtype=dtype, sizes=SIZES, progress=False)
        study.casa()
        seen[dtype] = envelopes_seen(out)
    assert seen["float32"] == {}
    envelope = seen["bfloat16"][study.name]
    assert envelope["dtype"] == "bfloat16" and envelope["n"] == 48 and 0 < envelope["v_s"] < 0.1
