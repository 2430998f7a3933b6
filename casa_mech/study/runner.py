"""Runs the notebooks with papermill in a run folder, and writes their pages and the manifest."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casa_mech.errors import CasaMechError
from casa_mech.plan import WORLD, OwnData, read_plan
from casa_mech.study import manifest as records
from casa_mech.study.execution import NotebookProcess, stop_all
from casa_mech.study.folder import RunFolder
from casa_mech.study.notebooks import Notebook, check_parameters, find_notebooks
from casa_mech.study.settings import StudySettings

Task = tuple[Notebook, dict[str, Any]]
"""A notebook and the parameters that it is given."""
_POLL_SECONDS = 0.1


def run_study(
    settings: StudySettings,
    out: Path | str | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, object] | None = None,
    arguments: Sequence[str] = (),
    notebooks_folder: Path | None = None,
    jobs: int = 0,
) -> Path:
    """Execute the suite and return the run folder. A folder that a stopped run left is continued.

    Args:
        settings: the study.
        out: the run folder; default `settings.default_folder`.
        only: names of the notebooks to run; default all.
        parameters: further notebook parameters, such as `n_eval`.
        arguments: the command line, for the manifest.
        notebooks_folder: where the notebooks are; default beside the package.
        jobs: notebooks at a time; 0: `default_jobs`.

    Raises:
        InputError: an unknown notebook or parameter, or a set of the plan that cannot be used; nothing has been started
            then.
        RunError: an unusable run folder, or a notebook that failed; the message names the cell's error.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, when every process of the run has ended. What was finished is kept.
    """
    notebooks = find_notebooks(only, notebooks_folder)
    overrides = check_parameters(notebooks, parameters or {})
    if settings.plan_name != WORLD:
        OwnData(read_plan(settings.plan_name)).check()
    folder = RunFolder.open(out or settings.default_folder, settings)
    started, began = records.now(), time.perf_counter()
    with _terminated_as_interrupted(), folder.locked():
        tasks: list[Task] = []
        for notebook in notebooks:
            values = {**_settings_parameters(settings, folder), **overrides[notebook.name]}
            tasks.append((notebook, {name: values[name] for name in values if name in notebook.parameters}))
        timings = _execute_all(tasks, folder, min(jobs or default_jobs(settings), len(tasks)))
        timings["total"] = round(time.perf_counter() - began, 2)
        timings["peak_memory_bytes"] = records.peak_memory()
        _write_manifest(folder, settings, overrides, arguments, timings, started)
    return folder.root


def default_jobs(settings: StudySettings) -> int:
    """Notebooks at a time: one for each of up to four cores where every model is small and on the CPU, else one.

    Each notebook loads the study's models for itself, so that four at a time hold four copies.
    """
    return min(4, os.cpu_count() or 1) if settings.is_small else 1


def _execute_all(tasks: Sequence[Task], folder: RunFolder, jobs: int) -> dict[str, float]:
    """Run the notebooks, `jobs` at a time, and return the seconds of each.

    Each has a process of its own (and its kernel's). What several of them need is made by the first to ask for it; the
    others wait for that (`RunFolder.artifact`). After a failure nothing more begins, and what runs is waited for; an
    interruption ends all of them, and nothing more begins either.
    """
    # Processes with a thread for each core would wait for each other.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    environment = {name: value for name, value in threads.items() if name not in os.environ}
    waiting = deque(enumerate(tasks, start=1))
    running: list[NotebookProcess] = []
    seconds: dict[str, float] = {}
    failures: list[CasaMechError] = []
    try:
        while running or (waiting and not failures):
            while waiting and not failures and len(running) < jobs:
                place, (notebook, values) = waiting.popleft()
                print(f"[{place}/{len(tasks)}] {notebook.name}", file=sys.stderr, flush=True)
                running.append(NotebookProcess(notebook.name, notebook.path, values, folder, environment))
            for process in [process for process in running if process.ended]:
                running.remove(process)
                try:
                    seconds[process.name] = process.seconds()
                except CasaMechError as error:
                    failures.append(error)
                    if running:
                        names = ", ".join(other.name for other in running)
                        print(f"{process.name} failed; waiting for what runs ({names})", file=sys.stderr, flush=True)
            time.sleep(_POLL_SECONDS)
    except BaseException:
        with _undisturbed():
            stop_all(running)
        raise
    if failures:
        raise failures[0]
    return {notebook.name: seconds[notebook.name] for notebook, _ in tasks}


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt for the length of the block, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM: interrupt}):
        yield


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C changes nothing for the length of the block."""
    with _handling({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}):
        yield


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """The signals' handlers in place for the length of the block; nothing off the main thread, which alone has any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _settings_parameters(settings: StudySettings, folder: RunFolder) -> dict[str, Any]:
    return {**settings.model_dump(mode="json"), "out": str(folder.root)}


def _write_manifest(
    folder: RunFolder,
    settings: StudySettings,
    overrides: Mapping[str, dict[str, Any]],
    arguments: Sequence[str],
    timings: dict[str, float],
    started: str,
) -> None:
    manifest = records.Manifest(
        settings={**settings.model_dump(mode="json"), "sizes": settings.sizes.model_dump()},
        parameters={name: values for name, values in overrides.items() if values},
        arguments=list(arguments),
        versions=records.versions(),
        git=records.git_state(),
        models=records.models_seen(folder.root),
        batch_envelopes=records.envelopes_seen(folder.root),
        data=records.data_hashes(),
        outputs=records.output_hashes(folder.root),
        timings=timings,
        started=started,
        finished=records.now(),
    )
    manifest.write(folder.path("manifest.json"))
