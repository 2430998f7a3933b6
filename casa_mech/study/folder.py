"""The run folder: bound to one study's settings, safe to stop at any moment, readable without this package.

What costs time is kept as an artifact: a folder that appears under its name only when it is complete, with `done.json`
saying what it was made from and the hash of each of its files. A run that was stopped finds the complete ones and
makes the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from casa_mech.errors import RunError
from casa_mech.files import TEMPORARY, check_folder, storage_error, write_text, writing_folder
from casa_mech.identity import file_sha256, folder_sha256
from casa_mech.study.settings import StudySettings

SCHEMA_VERSION = 1
_MARKER, _DONE, _LOCK = "run.json", "done.json", ".lock"


class RunFolder:
    """A folder that holds one study. Make it with `RunFolder.open`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, path: Path | str, settings: StudySettings) -> RunFolder:
        """The run folder at `path`: a new one, or one that an earlier run of the same settings left.

        Raises:
            RunError: the folder cannot be written to, holds something else, was made with other settings, or its marker
                is unreadable.
        """
        root = Path(path).absolute()
        marker = root / _MARKER
        check_folder(root, [_LOCK], _MARKER, create=True)
        if not marker.exists():
            content = {"schema_version": SCHEMA_VERSION, "settings": settings.identity}
            write_text(marker, json.dumps(content, indent=2) + "\n")
        _check_marker(marker, settings)
        return cls(root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second runner, and clear what this or a killed one left half-written.

        Raises:
            RunError: another process is running this study.
        """
        lock = FileLock(self.root / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.root} is in use by another run: wait for it, or choose another --out") from None
        except OSError as error:
            raise storage_error(error, self.root) from None
        try:
            self._clear_half_written()
            yield
        except BaseException:
            self._clear_half_written()
            raise
        finally:
            lock.release()

    def _clear_half_written(self) -> None:
        for left in list(self.root.rglob(f"{TEMPORARY}*")):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def path(self, *parts: str) -> Path:
        """A path inside the folder."""
        return self.root.joinpath(*parts)

    def artifact(self, kind: str, name: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
        """The folder `kind/name`, built by `build(folder)` unless a complete one with the same `key` is there.

        Of several processes that ask for it at once, one builds it and the others wait.

        Args:
            kind: group, such as `gates`.
            name: name in the group.
            key: all that the content depends on, as JSON values.
            build: writes the content into the (temporary) folder that it is given.
        """
        folder = self.free_artifact(kind, name, key, build, timeout=-1)
        assert folder is not None
        return folder

    def free_artifact(
        self, kind: str, name: str, key: Mapping[str, Any], build: Callable[[Path], None], timeout: float = 0
    ) -> Path | None:
        """As `artifact`, but None where another process is still building it after `timeout` seconds (-1: never)."""
        folder = self.root / kind / name
        if is_complete(folder, key):
            return folder
        lock = self.root / ".locks" / f"{kind}-{name}.lock".replace("/", "-")
        try:
            lock.parent.mkdir(exist_ok=True)
            # Reentrant within a process: building one artifact may ask for another.
            with FileLock(lock, timeout, is_singleton=True):
                if not is_complete(folder, key):
                    self._build(folder, key, build)
        except Timeout:
            return None
        except OSError as error:
            raise storage_error(error, self.root) from None
        return folder

    def _build(self, folder: Path, key: Mapping[str, Any], build: Callable[[Path], None]) -> None:
        with writing_folder(folder) as temporary:
            build(temporary)
            done = {"key": dict(key), "files": folder_sha256(temporary)}
            (temporary / _DONE).write_text(json.dumps(done, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_complete(folder: Path, key: Mapping[str, Any]) -> bool:
    """True for a complete artifact of this key whose files are unchanged."""
    try:
        done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        same_key = done["key"] == json.loads(json.dumps(dict(key)))
        return same_key and all(file_sha256(folder / name) == digest for name, digest in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _check_marker(marker: Path, settings: StudySettings) -> None:
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        settings_there, version = dict(content["settings"]), content["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{marker} is unreadable ({type(error).__name__}): delete the folder or choose another with --out"
        ) from None
    if version != SCHEMA_VERSION:
        raise RunError(f"{marker} has schema version {version}, this release writes {SCHEMA_VERSION}: change --out")
    wanted = settings.identity
    differing = [name for name in wanted if settings_there.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        raise RunError(
            f"{marker.parent} holds a run with {name}={settings_there.get(name)!r}, not {wanted[name]!r}: "
            f"give the same settings to continue it, or choose another --out"
        )
