"""Two trainings on one folder: the second is refused and told who holds it; a crash leaves no lock behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.casa import SETTINGS
from helpers.defenses import examples

from casa_mech.casa import Casa
from casa_mech.defenses import train_defense
from casa_mech.defenses.training import WORK
from casa_mech.errors import RunError
from casa_mech.locks import HOLDER, locked
from casa_mech.omni import Omni

FEW = {"max_steps": 3, "batch_size": 4, "checkpoint_every": 1}
SECOND_PROCESS = """
import sys, time
from pathlib import Path
from helpers.defenses import examples
from helpers.model import SHAPE, WORDS
from casa_mech.casa.trainer import Trainer
from casa_mech.defenses import train_defense
from casa_mech.organism.architecture import new_omni

out, gradients = Path(sys.argv[1]), Trainer._gradients

def hang(self):
    if self._progress.step == 2:
        (out.parent / "at-step-2").touch()
        time.sleep(600)
    return gradients(self)

Trainer._gradients = hang
omni = new_omni(WORDS, SHAPE, seed=0, source="tiny")
train_defense("casa", omni, examples(), out, progress=False, max_steps=3, batch_size=4, checkpoint_every=1)
"""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which trains in `tmp_path / "out"` and hangs after two steps."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "out")], env=environment)
    try:
        while not (tmp_path / "at-step-2").exists():
            assert process.poll() is None, "the second process ended"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_that_another_process_trains_in_is_refused(
    tiny_omni: Omni, tmp_path: Path, training: subprocess.Popen[bytes]
) -> None:
    holder = f"in use by process {training.pid} on {socket.gethostname()}: wait for it"
    log = (tmp_path / "out" / WORK / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=holder):
        train_defense("ssft", tiny_omni, examples(), tmp_path / "out", seed=1, progress=False, **FEW)
    with pytest.raises(RunError, match=holder):
        train_defense("casa", tiny_omni, examples(), tmp_path / "out", seed=1, progress=False, **FEW)
    casa = Casa.attach(tiny_omni)
    with pytest.raises(RunError, match=holder):
        casa.train(examples(), SETTINGS, tmp_path / "out" / WORK, progress=False)
    casa.detach()
    assert (tmp_path / "out" / WORK / "metrics.jsonl").read_bytes() == log

    training.send_signal(signal.SIGKILL)
    training.wait()
    assert (tmp_path / "out" / WORK / HOLDER).is_file()
    train_defense("casa", tiny_omni, examples(), tmp_path / "out", progress=False, **FEW).close()
    steps = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 3 and not (tmp_path / "out" / WORK).exists()


def test_a_thread_holds_a_folder_as_often_as_it_likes_and_no_other_does(tmp_path: Path) -> None:
    refused: list[RunError] = []

    def other() -> None:
        try:
            with locked(tmp_path):
                pass
        except RunError as error:
            refused.append(error)

    with locked(tmp_path):
        with locked(tmp_path / "." / "x" / ".."):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in str(refused[0])
    other()
    assert len(refused) == 1 and not (tmp_path / HOLDER).exists()


def test_files_beside_a_stopped_training_are_not_deleted(tiny_omni: Omni, tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        train_defense("ssft", tiny_omni, examples(), tmp_path, progress=False, **FEW)
    assert (tmp_path / "notes.txt").is_file()
