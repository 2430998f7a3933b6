"""One notebook in a process of its own: both ends of it, `NotebookProcess` and what runs in there.

The process reads its task from standard input and then watches that pipe. Where it closes, because the run is stopped
or its process has died, the notebook's kernel is ended and the process with it: nothing outlives a run. The process
leads a session of its own, so that Ctrl-C in a terminal reaches the run alone, which decides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from casa_mech.errors import CasaMechError, RunError
from casa_mech.files import storage_error, writing
from casa_mech.study.folder import RunFolder

INTERRUPT_SECONDS = 1.2
"""How long a kernel has to leave its cell, which removes what it had half written, before it is killed."""
STOP_SECONDS = 2.5
"""How long a notebook's process has to end itself and its kernel before both are killed."""
TIDY_SECONDS = 0.3
"""How long a notebook's process has, once its kernel is gone, to remove its own half-written files."""
_FAILED, _STOPPED = 2, 130


class NotebookProcess:
    """A notebook that is being executed in a process of its own.

    Args:
        name: of the notebook, for messages.
        path: the notebook's file.
        parameters: what its tagged cell is overridden with; JSON values.
        folder: the run folder that its copy and its page go to.
        environment: variables beside this process's.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        parameters: Mapping[str, Any],
        folder: RunFolder,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "casa_mech.study.execution"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
            start_new_session=True,
        )
        task = {"path": str(path), "parameters": dict(parameters), "folder": str(folder.root)}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already; `seconds` says so
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()

    @property
    def ended(self) -> bool:
        """Whether the process is over."""
        return self._process.poll() is not None

    def seconds(self) -> float:
        """Seconds that the notebook took, once it has `ended`.

        Raises:
            RunError: the notebook failed, or its process died; the message names the cell's error.
        """
        assert self._process.stdout is not None
        taken = round(time.perf_counter() - self._started, 2)
        answer = self._process.stdout.read()
        self._close()
        if self._process.returncode == 0:
            return taken
        if answer:
            raise RunError(json.loads(answer)["error"])
        if self._process.returncode == 1:
            raise RunError(f"{self.name}: it could not be executed; the traceback above says why")
        raise RunError(
            f"{self.name}: its process ended with status {self._process.returncode}, often for want of memory; free "
            "some and give the same command again, it continues"
        )

    def stop(self) -> None:
        """Ask the process to end its kernel and itself; `end` waits for that."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def end(self, deadline: float) -> None:
        """Wait until `deadline` (of `time.monotonic`) for a stopped process, then kill it and all that it started."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill_tree(self._process.pid)
            self._process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()


def stop_all(processes: Iterable[NotebookProcess]) -> None:
    """End the notebooks' processes and their kernels, within `STOP_SECONDS` and a moment."""
    processes = list(processes)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        process.stop()
    for process in processes:
        process.end(deadline)


def _kill_tree(pid: int) -> None:
    import psutil

    try:
        process = psutil.Process(pid)
        process.suspend()  # or it could start another child between the listing and its end
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def execute_notebook(path: Path, parameters: Mapping[str, Any], folder: RunFolder) -> None:
    """Run one notebook in this process's kernel; its executed copy and its page appear only when it ended well.

    Raises:
        RunError: a cell failed (the copy goes to `failed/`), or the kernel died.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # The kernel must be this interpreter's, also where a user has others installed under the same name.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that were not asked for
    name = path.stem
    target, failed = folder.path("notebooks", f"{name}.ipynb"), folder.path("failed", f"{name}.ipynb")
    with (
        writing(target) as temporary,
        folder.path("kernel.log").open("ab") as log,
        tempfile.TemporaryDirectory(prefix="casa-mech-") as sockets,
    ):
        try:
            papermill.execute_notebook(
                str(path),
                str(temporary),
                parameters=dict(parameters),
                kernel_name="python3",
                progress_bar=False,
                stderr_file=sys.stderr,
                cwd=str(folder.root),
                coalesce_streams=True,
                config=_kernel_config(sockets),
                kernel_manager_class=_logging_kernel(log),
            )
        except PapermillExecutionError as error:
            if error.ename == "KeyboardInterrupt":
                raise RunError(
                    f"{name}: its kernel was interrupted; give the same command again, it continues"
                ) from None
            failed.parent.mkdir(exist_ok=True)
            os.replace(temporary, failed)
            temporary.touch()
            raise _cell_error(name, error, failed) from None
        except DeadKernelError:
            raise RunError(
                f"{name}: the kernel died, often for want of memory; see {log.name}, free some and give the "
                "same command again, it continues"
            ) from None
        _write_page(temporary, folder.path("html", f"{name}.html"), name)
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


def _cell_error(name: str, error: Any, failed: Path) -> CasaMechError:
    first_line = str(error.evalue).strip().splitlines()[0] if str(error.evalue).strip() else error.ename
    if error.ename in {"CasaMechError", "InputError", "ModelError", "RunError", "InUseError", "JudgeDown"}:
        return RunError(f"{name}: {first_line}")
    return RunError(f"{name}: cell {error.exec_count} failed with {error.ename}: {first_line}; see {failed}")


def _write_page(executed: Path, page: Path, title: str) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(executed, as_version=4)
    body, _ = HTMLExporter(template_name="lab").from_notebook_node(content, resources={"metadata": {"name": title}})
    with writing(page) as temporary:
        temporary.write_text(body, encoding="utf-8")


def _end_with_parent() -> None:
    """Wait for the end of standard input; then end this process's kernel, and the process."""
    import psutil

    while os.read(sys.stdin.fileno(), 1):
        pass
    logging.disable()  # the client's complaint that its kernel died
    kernels = psutil.Process().children(recursive=True)
    for kernel in kernels:
        with contextlib.suppress(psutil.NoSuchProcess):
            # In a cell this raises KeyboardInterrupt, and what is being written is removed.
            kernel.terminate() if os.name == "nt" else kernel.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(kernels, timeout=INTERRUPT_SECONDS)
    for kernel in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            kernel.kill()
    time.sleep(TIDY_SECONDS)
    os._exit(_STOPPED)


def main() -> None:
    """Execute the notebook that standard input describes; an error's one line goes to standard output, as JSON."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Whatever else prints, a kernel included, prints to standard error.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    folder = RunFolder(Path(task["folder"]))
    try:
        execute_notebook(Path(task["path"]), task["parameters"], folder)
    except (CasaMechError, OSError) as error:
        line = storage_error(error, error.filename or folder.root) if isinstance(error, OSError) else error
        with contextlib.suppress(BrokenPipeError):  # nobody is left to read it
            json.dump({"error": str(line)}, answer)
            answer.flush()
        os._exit(_FAILED)  # at once: a kernel may be dying, and there is nothing left to tidy


if __name__ == "__main__":
    main()
