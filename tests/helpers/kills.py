"""Work that is killed at random moments and done again, in processes that start from this one's imports."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from casa_mech.cli import main
from casa_mech.files import TEMPORARY

KILLS = int(os.environ.get("CASA_MECH_KILLS", "0"))
"""How often each command is killed; 0: as often as its test says, so that all of them take less than a minute."""


def command(*arguments: object) -> Callable[[], None]:
    """`casa-mech` with `arguments`, as work."""
    return lambda: main([str(argument) for argument in arguments])


def killed(work: Callable[[], None], after: float | None, log: Path) -> tuple[bool, float]:
    """Do `work` in a forked process that is killed, with all that it started, `after` seconds (None: never).

    Returns:
        Whether it was killed before its end, and the seconds that it took. What it says is in the file `log`.
    """
    began = time.perf_counter()
    process = os.fork()
    if not process:
        _do(work, log)
    ended = 0
    while not ended and (after is None or time.perf_counter() - began < after):
        ended, _ = os.waitpid(process, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
        for member in family:
            member.kill()
        os.waitpid(process, 0)
        psutil.wait_procs(family[1:], timeout=20)
    return not ended, time.perf_counter() - began


def _do(work: Callable[[], None], log: Path) -> None:
    """Do it and end this process, whatever comes."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    try:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        work()
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def continued(
    work: Callable[[Path], Callable[[], None]], folder: Path, kills: int, content: Callable[[Path], object]
) -> None:
    """Assert that `work` on a folder, killed at `kills` random moments and done again, leaves what it leaves unstopped.

    Args:
        work: for a folder, the work that fills it.
        folder: where to make folders.
        kills: how many, each at a moment drawn evenly from the work's duration; after an end the work begins anew.
        content: of a folder that is finished, what is compared.
    """
    log = folder / "log.txt"
    _, seconds = killed(work(folder / "whole"), None, log)
    expected, rng = content(folder / "whole"), np.random.default_rng(kills)
    assert expected, log.read_text()
    left, round_, moments = KILLS or kills, 0, list[float]()
    while left:
        out = folder / f"cut-{round_}"
        while left:
            moment = float(rng.uniform(0, seconds))
            was_killed, _ = killed(work(out), moment, log)
            if not was_killed:
                break
            moments.append(moment)
            left -= 1
        killed(work(out), None, log)
        last = "\n".join(log.read_text().splitlines()[-5:])
        assert content(out) == expected, f"after kills at {moments} of {seconds:.1f} s: {last}"
        round_ += 1
    print(f"{len(moments)} kills within {seconds:.1f} s, {round_} folders: {[round(moment, 2) for moment in moments]}")


def files_in(folder: Path, *patterns: str) -> dict[str, bytes]:
    """The content of the files of `folder` that match, by name; what a killed process left half written is no file."""
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(found)
        if TEMPORARY not in str(path.relative_to(folder))
    }
