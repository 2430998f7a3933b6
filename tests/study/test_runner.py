"""The runner: notebooks in processes of their own, what becomes of them when one fails and when a run is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from casa_mech.errors import RunError
from casa_mech.files import TEMPORARY
from casa_mech.omni.checkpoint import WEIGHTS
from casa_mech.study.manifest import Manifest
from casa_mech.study.notebooks import check_parameters, find_notebooks
from casa_mech.study.runner import default_jobs, run_study
from casa_mech.study.settings import SHIPPED, SMALL_BYTES, StudySettings, checkpoint_bytes, settings_of

GENEROUS = 60
"""Seconds after which a test gives up waiting; what it waits for takes a few."""


def _notebooks(folder: Path, **cells: str) -> Path:
    """A folder of notebooks with the study's parameters and one more cell each."""
    folder.mkdir()
    parameters = 'model: str = "organism"\nout: str = ""'
    for name, source in cells.items():
        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        book = nbformat.v4.new_notebook(cells=[tagged, nbformat.v4.new_code_cell(source)])
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, folder / f"{name.removeprefix('n')}.ipynb")
    return folder


def test_a_failure_names_the_cell_and_lets_the_others_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outlives = "import os, time\nwhile not os.path.exists('failed/01_fails.ipynb'): time.sleep(0.1)\ntime.sleep(2)"
    folder = _notebooks(tmp_path / "books", n01_fails="1 / 0", n02_works=outlives, n03_waits="2 + 2")
    with pytest.raises(RunError, match=r"01_fails: cell \d failed with ZeroDivisionError"):
        run_study(StudySettings(), tmp_path / "run", notebooks_folder=folder, jobs=2)
    assert (tmp_path / "run" / "failed" / "01_fails.ipynb").exists()
    assert [path.name for path in (tmp_path / "run" / "notebooks").iterdir()] == ["02_works.ipynb"]
    assert "[3/3]" not in capfd.readouterr().err
    again = _notebooks(tmp_path / "mended", n01_fails="1 / 1")
    run_study(StudySettings(), tmp_path / "run", notebooks_folder=again)
    assert list(Manifest.read(tmp_path / "run" / "manifest.json").timings)[:1] == ["01_fails"]
    assert not list((tmp_path / "run" / "failed").iterdir())


@pytest.mark.parametrize("kernel_dies", [True, False])
def test_a_process_that_dies_is_one_line_and_leaves_nothing(tmp_path: Path, kernel_dies: bool) -> None:
    victim = "os.getpid()" if kernel_dies else "os.getppid()"
    folder = _notebooks(tmp_path / "books", n01_dies=f"import os\nos.kill({victim}, 9)\nimport time; time.sleep(60)")
    with pytest.raises(RunError, match=r"01_dies: (the kernel died|its process ended).*often for want of memory"):
        run_study(StudySettings(), tmp_path / "run", notebooks_folder=folder)
    assert not list((tmp_path / "run").rglob(f"{TEMPORARY}*"))
    assert not list((tmp_path / "run").rglob("*.ipynb"))


def test_a_model_in_a_relative_folder_is_found_by_the_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    source = "import os\nassert os.path.isdir(model) and os.getcwd() == out, (model, os.getcwd())"
    settings = settings_of(model="my-model", plan="world", profile="smoke")
    run_study(settings, "run", notebooks_folder=_notebooks(tmp_path / "books", n01_looks=source))
    assert settings.model == str(tmp_path / "my-model")
    assert settings.default_folder.name == "my-model-smoke-seed0"
    assert settings_of(model=str(tmp_path / "my-model"), plan="world", profile="smoke").identity == settings.identity


def test_shipped_models_and_hub_ids_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "organism").mkdir()
    monkeypatch.chdir(tmp_path)
    assert StudySettings().models == ("organism", "organism-split")
    assert StudySettings(model="Qwen/Qwen2.5-Omni-3B").model == "Qwen/Qwen2.5-Omni-3B"
    assert {name: WEIGHTS / name for name in SHIPPED} == SHIPPED


def test_paths_among_the_parameters_are_seen_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    values = check_parameters(find_notebooks(["04"]), {"judge_model": "sets", "judge": "refusal"})
    assert values["04_benchmarks"] == {"judge_model": str(tmp_path / "sets"), "judge": "refusal"}


def test_only_small_models_run_side_by_side(
    tmp_path: Path, random_organism: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    large = tmp_path / "large"
    large.mkdir()
    with (large / "model.safetensors").open("wb") as weights:
        weights.truncate(SMALL_BYTES + 1)
    assert checkpoint_bytes(str(large)) == SMALL_BYTES + 1
    assert default_jobs(StudySettings()) == 4
    assert default_jobs(StudySettings(model=str(random_organism))) == 4
    assert default_jobs(StudySettings(device="cuda")) == 1
    assert default_jobs(StudySettings(model="Qwen/Qwen2.5-Omni-3B")) == 1
    assert default_jobs(StudySettings(model=str(large))) == 1
    assert default_jobs(StudySettings(model=str(random_organism), control=str(large))) == 1


def _run_command(model: Path, out: Path, jobs: int) -> list[str]:
    only = [argument for name in ("02", "03", "09") for argument in ("--only", name)]
    command = [sys.executable, "-m", "casa_mech", "run", "--model", str(model), "--profile", "smoke", *only]
    return [*command, "--out", str(out), "--jobs", str(jobs), "-p", "n_probe=6"]


def _family(process: subprocess.Popen[str], jobs: int) -> list[psutil.Process]:
    """The run's processes, once `jobs` kernels are among them."""
    deadline = time.monotonic() + GENEROUS
    while time.monotonic() < deadline:
        family = psutil.Process(process.pid).children(recursive=True)
        if sum(any("ipykernel" in word for word in _words(member)) for member in family) >= jobs:
            return family
        time.sleep(0.1)
    pytest.fail(f"no {jobs} kernels after {GENEROUS} s")


def _words(member: psutil.Process) -> list[str]:
    try:
        return list(member.cmdline())
    except psutil.Error:
        return []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_stopped_run_leaves_no_process(random_organism: Path, tmp_path: Path, number: int, jobs: int) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(_run_command(random_organism, out, jobs), stderr=subprocess.PIPE, text=True)
    family = _family(process, jobs)
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # while the first is at work: it changes nothing
    _, errors = process.communicate(timeout=GENEROUS)
    _, alive = psutil.wait_procs(family, timeout=GENEROUS)
    assert not alive and process.returncode == 130
    assert "stopped; what was finished is kept" in errors
    assert f"[{jobs}/3]" in errors and f"[{jobs + 1}/3]" not in errors
    assert not list(out.rglob(f"{TEMPORARY}*")) and not (out / "failed").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_run_leaves_no_process(random_organism: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(_run_command(random_organism, tmp_path / "run", 2), stderr=subprocess.DEVNULL, text=True)
    family = _family(process, 2)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=GENEROUS)
    assert not alive
