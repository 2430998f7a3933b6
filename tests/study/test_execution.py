"""What a run says when a notebook fails."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from casa_mech.errors import RunError
from casa_mech.study.execution import _cell_error


@pytest.mark.parametrize("kind", ["RunError", "InputError", "ModelError", "InUseError", "JudgeDown"])
def test_an_error_that_a_user_can_mend_is_said_as_it_is(kind: str) -> None:
    error = SimpleNamespace(ename=kind, evalue="no space left on the disk of runs/a: free some", exec_count=3)
    said = _cell_error("02_casa_training", error, Path("failed.ipynb"))
    assert isinstance(said, RunError)
    assert str(said) == "02_casa_training: no space left on the disk of runs/a: free some"


def test_any_other_error_is_told_by_its_cell() -> None:
    error = SimpleNamespace(ename="KeyError", evalue="'a'", exec_count=3)
    assert (
        str(_cell_error("02", error, Path("failed.ipynb"))) == "02: cell 3 failed with KeyError: 'a'; see failed.ipynb"
    )
