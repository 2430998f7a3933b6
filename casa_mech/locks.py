"""One process at a time in a folder; the one that is refused reads who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from casa_mech.errors import RunError
from casa_mech.files import storage_error, write_text

LOCK, HOLDER = ".lock", ".lock-holder.json"


class InUseError(RunError):
    """Another process or thread holds the folder."""


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold `folder`, made if need be, for the length of a block; the same thread may hold it more than once.

    The operating system lets go of a lock when its process ends, however that happens, so a crash leaves none behind.

    Raises:
        InUseError: another process or thread holds it (the message says which process, on which machine).
        RunError: the folder cannot be written.
    """
    # One object for each path: a second lock on the same file would shut out its own process.
    folder = Path(folder).resolve()
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InUseError(
            f"{folder} is in use by {_holder(folder)}: wait for it or stop it, or give another folder"
        ) from None
    except OSError as error:
        raise storage_error(error, folder) from None
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            write_text(folder / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        yield
    finally:
        if outermost:
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # between taking the lock and writing it down
        return "another process"
