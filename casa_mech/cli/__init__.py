"""The `casa-mech` command: thin, one function a subcommand. Everything heavy is imported when a subcommand runs."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Any

from casa_mech.cli import attack, audit, compare, datasets, family, judge, model, organism, plan, study
from casa_mech.cli.app import INTERRUPTED, app, note
from casa_mech.errors import CasaMechError, missing_extra

__all__ = ["attack", "audit", "compare", "datasets", "family", "judge", "main", "model", "organism", "plan", "study"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one line on standard error and status 2; Ctrl-C is status 130."""
    _write_what_can_be_written()
    _check_arguments(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    try:
        app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into this
            note("stopped; what was finished is kept, and the same command continues from there")
        raise
    except CasaMechError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if not missing_extra(error):
            raise
        _fail(missing_extra(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        from casa_mech.files import storage_error

        if error.errno is None:
            raise
        # Whether it was read or written is not known here; only a full disk is surely about writing.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            _fail(str(storage_error(error, error.filename or "the output")))
        _fail(f"{error.filename or 'a file'} cannot be used ({error.strerror}): check the path and who may use it")


def _write_what_can_be_written() -> None:
    """Let a terminal or pipe that is not UTF-8 show other characters as escapes, instead of stopping there."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and (stream.encoding or "").lower().replace("-", "") != "utf8":
            reconfigure(errors="backslashreplace")


def _check_arguments(arguments: list[str]) -> None:
    """Refuse what no table, index or JSON could hold: bytes that are not UTF-8, in a prompt or a file's name."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            _fail(f"the argument {argument!a} is not UTF-8: give the text as UTF-8, or rename the file")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"warning: {' '.join(str(message).split())}")


def _fail(message: str) -> None:
    print(f"casa-mech: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
