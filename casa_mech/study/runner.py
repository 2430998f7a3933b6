"""Runs the notebooks with papermill in a run folder, and writes their pages and the manifest."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

from casa_mech.errors import CasaMechError, RunError
from casa_mech.files import writing
from casa_mech.omni.load import WEIGHTS
from casa_mech.study import manifest as records
from casa_mech.study.folder import RunFolder
from casa_mech.study.notebooks import Notebook, check_parameters, find_notebooks
from casa_mech.study.settings import StudySettings


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
        InputError: an unknown notebook or parameter; nothing has been started then.
        RunError: an unusable run folder, or a notebook that failed; the message names the cell's error.
    """
    notebooks = find_notebooks(only, notebooks_folder)
    given = check_parameters(notebooks, parameters or {})
    folder = RunFolder.open(out or settings.default_folder, settings)
    started, began = records.now(), time.perf_counter()
    with folder.locked():
        tasks = []
        for notebook in notebooks:
            values = {**_settings_parameters(settings, folder), **given[notebook.name]}
            tasks.append((notebook, {name: values[name] for name in values if name in notebook.parameters}))
        timings = _execute_all(tasks, folder, min(jobs or default_jobs(settings), len(tasks)))
        timings["total"] = round(time.perf_counter() - began, 2)
        timings["peak_memory_bytes"] = records.peak_memory()
        _write_manifest(folder, settings, given, arguments, timings, started)
    return folder.root


def default_jobs(settings: StudySettings) -> int:
    """Notebooks at a time: one for each of up to four cores where the model is an organism's size, else one."""
    small = (WEIGHTS / settings.model).is_dir() and settings.device in ("auto", "cpu")
    return min(4, os.cpu_count() or 1) if small else 1


def _execute_all(tasks: Sequence[tuple[Notebook, dict[str, Any]]], folder: RunFolder, jobs: int) -> dict[str, float]:
    """Run the notebooks, `jobs` at a time, and return the seconds of each; the first failure stops what has not begun.

    Each has a process of its own (and its kernel's). What several of them need is made by the first to ask for it; the
    others wait for that (`RunFolder.artifact`).
    """
    if jobs == 1:
        return {task[0].name: _timed(*task, folder, f"[{n}/{len(tasks)}]") for n, task in enumerate(tasks, start=1)}
    # Two processes with a thread for each core would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    timings: dict[str, float] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(_timed, *task, folder, f"[{n}/{len(tasks)}]"): task[0].name
            for n, task in enumerate(tasks, start=1)
        }
        try:
            for done in as_completed(running):
                timings[running[done]] = done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {task[0].name: timings[task[0].name] for task in tasks}


def _timed(notebook: Notebook, values: dict[str, Any], folder: RunFolder, place: str) -> float:
    print(f"{place} {notebook.name}", file=sys.stderr, flush=True)
    at = time.perf_counter()
    _execute(notebook, values, folder)
    return round(time.perf_counter() - at, 2)


def _settings_parameters(settings: StudySettings, folder: RunFolder) -> dict[str, Any]:
    return {**settings.model_dump(mode="json"), "out": str(folder.root)}


def _execute(notebook: Notebook, values: dict[str, Any], folder: RunFolder) -> None:
    """Run one notebook; its executed copy and its page appear only when it ended well."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # The kernel must be this interpreter's, also where a user has others installed under the same name.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    target, failed = folder.path("notebooks", f"{notebook.name}.ipynb"), folder.path("failed", f"{notebook.name}.ipynb")
    with (
        writing(target) as temporary,
        folder.path("kernel.log").open("ab") as log,
        tempfile.TemporaryDirectory(prefix="casa-mech-") as sockets,
    ):
        try:
            papermill.execute_notebook(
                str(notebook.path),
                str(temporary),
                parameters=values,
                kernel_name="python3",
                progress_bar=False,
                stderr_file=sys.stderr,
                cwd=str(folder.root),
                coalesce_streams=True,
                config=_kernel_config(sockets),
                kernel_manager_class=_logging_kernel(log),
            )
        except PapermillExecutionError as error:
            failed.parent.mkdir(exist_ok=True)
            os.replace(temporary, failed)
            temporary.touch()
            raise _cell_error(notebook, error, failed) from None
        except DeadKernelError:
            raise RunError(
                f"{notebook.name}: the kernel died, often for want of memory; see {log.name}, free some and give the "
                "same command again, it continues"
            ) from None
        _write_page(temporary, folder.path("html", f"{notebook.name}.html"), notebook.name)
    failed.unlink(missing_ok=True)


def _kernel_config(sockets: str) -> Any:
    from traitlets.config import Config

    if os.name == "nt":
        return Config()
    # Sockets in a folder of this user's alone rather than TCP ports, where the system has them.
    return Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})


def _logging_kernel(log: IO[bytes]) -> type:
    """A kernel manager whose kernels write their own complaints (not the notebook's output) to `log`."""
    from jupyter_client.manager import AsyncKernelManager

    class LoggingKernelManager(AsyncKernelManager):
        async def _async_start_kernel(self, **kwargs: Any) -> None:
            await super()._async_start_kernel(**{"stderr": log, **kwargs})

        start_kernel = _async_start_kernel

    return LoggingKernelManager


def _cell_error(notebook: Notebook, error: Any, failed: Path) -> CasaMechError:
    first = str(error.evalue).strip().splitlines()[0] if str(error.evalue).strip() else error.ename
    if error.ename in {"CasaMechError", "InputError", "ModelError", "RunError"}:
        return RunError(f"{notebook.name}: {first}")
    return RunError(f"{notebook.name}: cell {error.exec_count} failed with {error.ename}: {first}; see {failed}")


def _write_page(executed: Path, page: Path, title: str) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(executed, as_version=4)
    body, _ = HTMLExporter(template_name="lab").from_notebook_node(content, resources={"metadata": {"name": title}})
    with writing(page) as temporary:
        temporary.write_text(body, encoding="utf-8")


def _write_manifest(
    folder: RunFolder,
    settings: StudySettings,
    given: Mapping[str, dict[str, Any]],
    arguments: Sequence[str],
    timings: dict[str, float],
    started: str,
) -> None:
    manifest = records.Manifest(
        settings={**settings.model_dump(mode="json"), "sizes": settings.sizes.model_dump()},
        parameters={name: values for name, values in given.items() if values},
        arguments=list(arguments),
        versions=records.versions(),
        git=records.git_state(),
        models=records.models_seen(folder.root),
        data=records.data_hashes(),
        outputs=records.output_hashes(folder.root),
        timings=timings,
        started=started,
        finished=records.now(),
    )
    manifest.write(folder.path("manifest.json"))
