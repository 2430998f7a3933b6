"""The one family of errors a user can cause; the command line prints them as one line and exits with status 2."""

from __future__ import annotations

from types import MappingProxyType

EXTRAS = MappingProxyType(
    {
        "matplotlib": "study",
        "papermill": "study",
        "nbformat": "study",
        "nbclient": "study",
        "nbconvert": "study",
        "jupyter_client": "study",
        "traitlets": "study",
        "transformer_lens": "lens",
        "httpx": "judges",
        "tenacity": "judges",
    }
)
"""The extra that brings a module which the core does without."""


class CasaMechError(Exception):
    """Base of every error that a user can cause and mend. The message names what was wrong, where, and the way out.

    It is one line, also where it repeats what a user's file says.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))


class InputError(CasaMechError, ValueError):
    """A query, file, column or option that cannot be used as given."""


class ModelError(CasaMechError, RuntimeError):
    """A model, adapter or checkpoint that is missing, corrupt or does not fit."""


class RunError(CasaMechError, RuntimeError):
    """A run folder that cannot be written, or that holds something else than the run expects."""


def missing_extra(error: ImportError) -> str:
    """One line that names the extra which brings the module that `error` misses; "" where no extra does."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return ""
    return f"this needs {module}, which is not installed: pip install 'casa-mech[{EXTRAS[module]}]'"


def reason_of(error: Exception) -> str:
    """Why something failed, in one line: of a record's fault the field and what is wrong with it, else the first line.

    For errors of others (decoders, parsers, pydantic) that go into a message of ours.
    """
    if isinstance(error, RecursionError):
        return "nested too deep"
    faults = getattr(error, "errors", None)
    if callable(faults):  # a ValidationError of pydantic, whose text begins with the name of a class
        first = faults()[0]
        field, fault = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        return f"{field}: {fault}" if field else fault
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
