"""One call of the `casa-mech` command in the test's own process."""

from __future__ import annotations

import pytest

from casa_mech.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `casa-mech` with `arguments`."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = caught.value.code
    return int(code) if isinstance(code, int) else 0, captured.out, captured.err
