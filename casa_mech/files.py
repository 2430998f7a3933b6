"""Writing files whole or not at all (a temporary name beside it, then a rename), into folders that are ours."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from casa_mech.errors import CasaMechError, RunError

TEMPORARY = ".writing-"
"""Prefix of what is being written; a killed process may leave such names behind, and readers pass over them."""
STRAY = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".nfs*")
"""Patterns of names that desktops and network disks put into any folder; they are nobody's work."""


def storage_error(error: OSError, path: Path | str) -> RunError:
    """`error` as one line that names the path and the way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left on the disk of {path}: free some and give the same command again, it continues")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(f"cannot write {path} ({error.strerror}): choose a folder that you may write to")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return RunError(f"cannot write {path}: a file of that name, or of a folder's name on the way, is there already")
    return RunError(f"cannot write {path}: {error.strerror or error}")


def reading_error(error: OSError, path: Path | str) -> RunError:
    """`error` in reading, as one line that names the path and the way out."""
    return RunError(f"cannot read {path} ({error.strerror or error}): check the path, and that you may read it")


def check_folder(folder: Path | str, owned: Collection[str] = (), marker: str = "", create: bool = False) -> None:
    """Refuse a folder that holds somebody else's files; one that is not there, or empty, is right.

    Args:
        folder: where something is to be written.
        owned: names, or patterns of names (`fnmatch`), of what an earlier call may have left in it; what a killed one
            left half-written need not be named, nor a desktop's own files (`STRAY`).
        marker: a file or folder by which all that lies beside it is known to be ours.
        create: make the folder, so that a place where that cannot be done is found before any work.

    Raises:
        RunError: it holds other files, is a file, or cannot be made or read.
    """
    folder, patterns = Path(folder), (*owned, f"{TEMPORARY}*", *STRAY)
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from None
    try:
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    except NotADirectoryError as error:
        raise storage_error(error, folder) from None
    except OSError as error:
        raise reading_error(error, folder) from None
    others = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if others and marker not in names:
        lacking = f" and no {marker}" if marker else ""
        raise RunError(f"{folder} holds other files ({min(others)}, …){lacking}: choose a new or empty --out")


def check_writable(folder: Path) -> None:
    """Make `folder` if it is not there, and try it: better now than after the work.

    Raises:
        RunError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=TEMPORARY, dir=folder):
            pass
    except OSError as error:
        raise storage_error(error, folder) from None


@contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to `path` when the block ends well and removed when it does not.

    Raises:
        RunError: the disk is full, or the place cannot be written to.
    """
    path = Path(path)
    with _translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept: savers such as matplotlib's choose the format by it.
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.name, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            temporary.chmod(0o666 & ~_umask())
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: Path | str) -> Iterator[Path]:
    """Like `writing`, for a folder. What stands at `path` is replaced only when the block ends well.

    Raises:
        RunError: the disk is full, or the place cannot be written to.
    """
    path = Path(path)
    with _translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, suffix=path.name, dir=path.parent))
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            remove_folder(path)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path | str) -> None:
    """Remove a folder, if it is there, whole or not at all: it loses its name first, so half of it is never found."""
    path = Path(path)
    if path.is_dir():
        aside = Path(tempfile.mkdtemp(prefix=TEMPORARY, suffix=path.name, dir=path.parent))
        os.replace(path, aside / path.name)
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text whole or not at all.

    Raises:
        RunError: the disk is full, or the place cannot be written to.
    """
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename and not _near(Path(error.filename), path)):
            raise
        raise storage_error(error, path) from error
    except Exception as error:
        # safetensors raises an error of its own, with the system's number in its words.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, CasaMechError) or number is None:
            raise
        raise storage_error(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error


def _near(other: Path, path: Path) -> bool:
    """True for a file that is the target, inside it, or on the way to it (not, say, for an input that is missing)."""
    folder = path.parent.absolute()
    other = other.absolute()
    return folder in (other, *other.parents) or other in folder.parents


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
