"""The `casa-mech` command: thin, one function a subcommand. Everything heavy is imported when a subcommand runs."""

from __future__ import annotations

import os
import sys

from casa_mech.cli import attack, audit, compare, datasets, family, judge, model, organism, plan, study
from casa_mech.cli.app import INTERRUPTED, app, note
from casa_mech.errors import CasaMechError, missing_extra

__all__ = ["attack", "audit", "compare", "datasets", "family", "judge", "main", "model", "organism", "plan", "study"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one line on standard error and status 2; Ctrl-C is status 130."""
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
    except OSError as error:
        from casa_mech.files import storage_error

        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if error.errno is None:
            raise
        _fail(str(storage_error(error, error.filename or "the output")))


def _fail(message: str) -> None:
    print(f"casa-mech: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
