"""The same work in several processes of one thread each, which share it out by the locks of what they make."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.synchronize import Event
from types import ModuleType
from typing import Any

from casa_mech.errors import CasaMechError, RunError

Note = Callable[[str], None]
"""Takes a line for the user."""
Work = Callable[[Note, Callable[[], bool]], None]
"""What a process does, given where its lines go and whether it is to stop; sent to it, so a picklable callable."""
ONE_THREAD: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_POLL_SECONDS = 1.0


def in_processes(work: Work, jobs: int, what: str, note: Note = lambda line: None) -> None:
    """Do `work` in `jobs` processes at once; after a failure nothing more begins, and what runs is waited for.

    Args:
        work: called in each of them.
        jobs: how many.
        what: whose processes they are, for the message when one dies.
        note: called with the lines that they send.

    Raises:
        CasaMechError: the first that a process raised, as a `RunError`.
        RunError: a process died.
    """
    context = get_context("spawn")
    stopped, messages = context.Event(), context.SimpleQueue()
    processes = [context.Process(target=_worker, args=(work, stopped, messages), daemon=True) for _ in range(jobs)]
    failure = ""
    try:
        with _environment(ONE_THREAD), _without_main():
            for process in processes:
                process.start()
        while any(process.is_alive() for process in processes) or not messages.empty():
            while not messages.empty():
                kind, line = messages.get()
                failure = failure or (line if kind == "failed" else "")
                if kind == "note":
                    note(line)
            connection.wait([process.sentinel for process in processes if process.is_alive()], _POLL_SECONDS)
    except BaseException:
        for process in processes:
            if process.pid is not None:
                process.kill()
        raise
    if failure:
        raise RunError(failure)
    died = next((process.exitcode for process in processes if process.exitcode), None)
    if died is not None:
        raise RunError(
            f"a process of the {what} died (status {died}), often for want of memory; give the same command again, it "
            "continues"
        )


def _worker(work: Work, stopped: Event, messages: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            work(lambda line: messages.put(("note", line)), stopped.is_set)
        except CasaMechError as error:
            stopped.set()
            messages.put(("failed", str(error)))


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone, however that ended."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that processes started in the block get."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes started in the block do not read the script that began this one, which need not expect that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
