"""The one family of errors a user can cause; the command line prints them as one line and exits with status 2."""


class CasaMechError(Exception):
    """Base of every error that a user can cause and mend. The message names what was wrong, where, and the way out."""


class InputError(CasaMechError, ValueError):
    """A query, file, column or option that cannot be used as given."""


class ModelError(CasaMechError, RuntimeError):
    """A model, adapter or checkpoint that is missing, corrupt or does not fit."""


class RunError(CasaMechError, RuntimeError):
    """A run folder that cannot be written, or that holds something else than the run expects."""
