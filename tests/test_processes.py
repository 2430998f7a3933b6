"""Work in several processes: shared out, failing in one line, and without the script that began it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from casa_mech.errors import InputError, RunError
from casa_mech.processes import Note, in_processes


def _tell(folder: Path, note: Note, stopped: Callable[[], bool]) -> None:
    (folder / str(os.getpid())).write_text(os.environ["OMP_NUM_THREADS"])
    note(f"from {os.getpid()}")


def _fail(note: Note, stopped: Callable[[], bool]) -> None:
    raise InputError("this part cannot be made")


def _die(note: Note, stopped: Callable[[], bool]) -> None:
    os._exit(7)


def test_each_process_has_one_thread_and_tells_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    lines: list[str] = []
    in_processes(partial(_tell, tmp_path), 2, "test", lines.append)
    assert sorted(lines) == sorted(f"from {path.name}" for path in tmp_path.iterdir()) and len(lines) == 2
    assert {path.read_text() for path in tmp_path.iterdir()} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "2" and str(os.getpid()) not in lines


@pytest.mark.parametrize(
    ("work", "message"),
    [(_fail, "^this part cannot be made$"), (_die, r"^a process of the test died \(status 7\)")],
)
def test_failures_are_one_line(work: Callable[[Note, Callable[[], bool]], None], message: str) -> None:
    with pytest.raises(RunError, match=message):
        in_processes(work, 1, "test")


def test_a_script_without_a_guard_is_not_read_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\nfrom pathlib import Path\nprint('read', flush=True)\n"
        "import test_processes\nfrom casa_mech.processes import in_processes\n"
        f"in_processes(partial(test_processes._tell, Path({str(tmp_path)!r})), 1, 'test', lambda line: print(line))\n"
    )
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    lines = ended.stdout.splitlines()
    assert lines[0] == "read" and len(lines) == 2 and lines[1].startswith("from ")
