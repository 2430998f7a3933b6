"""Folders that are written into: our own and empty ones pass, somebody else's are refused and left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from casa_mech.errors import RunError
from casa_mech.files import TEMPORARY, check_folder


@pytest.mark.parametrize(
    ("names", "passes"),
    [
        ([], True),
        (["results.csv", f"{TEMPORARY}x.parquet"], True),
        (["part-1.parquet"], True),
        (["thesis.tex", "run.json"], True),
        (["thesis.tex"], False),
        (["results.csv", ".git"], False),
    ],
)
def test_a_folder_is_ours_by_its_names_or_its_marker(tmp_path: Path, names: list[str], passes: bool) -> None:
    for name in names:
        (tmp_path / name).write_text("x")
    if passes:
        check_folder(tmp_path, ["results.csv", "part-*"], "run.json")
    else:
        with pytest.raises(RunError, match=r"holds other files \(.*, …\) and no run.json: choose a new or empty --out"):
            check_folder(tmp_path, ["results.csv", "part-*"], "run.json")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names)


def test_a_folder_that_is_not_there_passes_and_is_made_on_request(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    check_folder(tmp_path / "a" / "b", create=True)
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("x")
    for create in (False, True):
        with pytest.raises(RunError, match="a file of that name, or of a folder's name on the way, is there already"):
            check_folder(tmp_path / "file", create=create)
