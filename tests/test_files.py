"""Folders that are written into: our own and empty ones pass, somebody else's are refused and left as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from casa_mech.errors import RunError
from casa_mech.files import TEMPORARY, check_folder, remove_folder, writing_folder


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


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "gate"
    with writing_folder(target) as new:
        (new / "old").write_text("x")
    with pytest.raises(KeyboardInterrupt), writing_folder(target) as new:
        (new / "new").write_text("y")
        raise KeyboardInterrupt
    assert [entry.name for entry in target.iterdir()] == ["old"]
    removed: list[bool] = []
    # While what was there is being removed, a killed process could stop at any file: it has lost its name before.
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: removed.append(target.exists()))
    with writing_folder(target) as new:
        (new / "new").write_text("y")
    assert removed[0] is False and [entry.name for entry in target.iterdir()] == ["new"]
    remove_folder(target)
    remove_folder(target)
    assert not target.exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot write"), writing_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "x"
