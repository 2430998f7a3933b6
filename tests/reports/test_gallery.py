"""The gallery: no figure without its numbers, and a manifest that says where they came from."""

from pathlib import Path

import pandas as pd
import pytest
from helpers.paths import GALLERY

from casa_mech.identity import file_sha256
from casa_mech.study.manifest import Manifest

APART = ("figstep_comparison",)
"""Made from public data that the repository does not hold; tests/attacks/test_figstep.py makes its numbers again."""
NAMES = sorted(path.stem for path in GALLERY.glob("*.png"))
STUDY = [name for name in NAMES if name not in APART]


def test_the_gallery_is_that_of_the_default_study() -> None:
    manifest = Manifest.read(GALLERY / "manifest.json")
    assert manifest.settings["profile"] == "default" and manifest.settings["model"] == "organism"
    assert Manifest.read(GALLERY / "smoke" / "manifest.json").settings["profile"] == "smoke"
    listed = [Path(name).stem for name in manifest.outputs if name.startswith("figures/")]
    assert sorted(listed) == STUDY


@pytest.mark.parametrize("suffix", [".svg", ".csv"])
def test_every_picture_has_its_vector_and_its_numbers(suffix: str) -> None:
    assert NAMES
    assert sorted(path.stem for path in GALLERY.glob(f"*{suffix}")) == NAMES


@pytest.mark.parametrize("name", STUDY)
def test_numbers_are_those_the_manifest_hashed(name: str) -> None:
    path = GALLERY / f"{name}.csv"
    assert len(pd.read_csv(path)) > 0
    assert Manifest.read(GALLERY / "manifest.json").outputs[f"figures/{name}.csv"] == file_sha256(path)


def test_cells_are_large_enough() -> None:
    rates = pd.read_csv(GALLERY / "attack_success.csv")
    assert (rates["n"] >= 300).all()
    assert set(rates["model"]) == {"organism", "organism-split"}
    assert {"pretrained", "CASA"} <= set(rates["defense"])
