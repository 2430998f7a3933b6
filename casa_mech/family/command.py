"""`casa-mech family`: the whole map in one folder, by any number of processes, each step made once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.errors import RunError
from casa_mech.family.member import ORGANISM, PREDICTORS, MemberRun
from casa_mech.family.plan import Plan
from casa_mech.files import check_folder, write_text, writing
from casa_mech.locks import InUseError, locked
from casa_mech.processes import Note, in_processes
from casa_mech.study.folder import RunFolder
from casa_mech.study.manifest import git_state, now, versions

TABLES = ("organisms", "predictors", "transfer", "split", "mends")
PLAN = "plan.json"
_MARKER, _SCHEMA = "family.json", 1
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Request:
    """A map as the command line asks for it."""

    plan: Plan
    """Its members and sizes."""
    out: Path
    """Its folder, which grows from call to call."""
    members: tuple[str, ...] = ()
    """Those to work on now; empty for all."""
    jobs: int = 1
    """Members at a time, each in a process of one thread."""
    keep: bool = False
    """Whether the weights of organisms and gates stay."""
    mends: bool = True
    """Whether mends are tried on the members that ask for them."""

    def runs(self, progress: bool = False, note: Callable[[str], None] = lambda line: None) -> list[MemberRun]:
        """The members to work on."""
        folder = RunFolder(self.out.absolute())
        members = self.plan.named(self.members)
        return [MemberRun(member, self.plan, folder, self.keep, self.mends, progress, note) for member in members]


def family(request: Request, progress: bool = False, note: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the map and write its tables into `request.out`; the same call after a stop goes on.

    Several calls may share a folder: each takes the members that nobody works on, and waits for the last ones.

    Args:
        request: what to make.
        progress: whether to draw bars, with one job.
        note: called with a line when a step is finished.

    Returns:
        `out`, `tables` (their names and rows), `members` (how many are finished, of how many in the plan), `seconds`.

    Raises:
        InputError: a member that is not in the plan. RunError: a folder that cannot be used, or a process that died.
    """
    began = time.perf_counter()
    request.plan.named(request.members)
    _open(request.out)
    jobs = min(request.jobs, sum(not run.finished for run in request.runs()))
    if jobs > 1:
        in_processes(partial(_work_on, request), jobs, "map", note)
    elif jobs:
        _work(request.runs(progress, note))
    rows = write_tables(request)
    done = sum(run.finished for run in replace(request, members=()).runs())
    return {
        "out": str(request.out),
        "tables": rows,
        "members": {"finished": done, "in the plan": len(request.plan.members)},
        "seconds": round(time.perf_counter() - began, 1),
    }


def write_tables(request: Request) -> dict[str, int]:
    """Write `TABLES` (CSV) and `plan.json` from all parts of the plan that are there; returns the rows of each table.

    `plan.json` holds the plan, the versions and the order in which the parts were made, by the time they were finished.

    Raises:
        RunError: the record does not bear out that a member's predictors were there before its gates.
    """
    runs = replace(request, members=()).runs()
    order = sorted((step for run in runs for step in run.order()), key=lambda step: step["finished"])
    check_order(order)
    counts = {}
    for name in TABLES:
        table = pd.concat([run.table(name) for run in runs], ignore_index=True)
        counts[name] = len(table)
        if len(table):
            with writing(request.out / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    record = {
        "schema_version": _SCHEMA,
        "plan": request.plan.model_dump(mode="json"),
        "versions": versions(),
        "git": git_state(),
        "written": now(),
        "order": order,
    }
    write_text(request.out / PLAN, json.dumps(record, indent=1) + "\n")
    return counts


def check_order(order: Sequence[dict[str, Any]]) -> None:
    """Refuse a record in which a gate was begun before its organism's predictors were finished.

    Raises:
        RunError: the message names the member and the step.
    """
    read = {step["member"]: step["finished"] for step in order if step["step"] == PREDICTORS}
    for step in order:
        if step["step"] not in (ORGANISM, PREDICTORS) and not (
            step["member"] in read and read[step["member"]] <= step["began"]
        ):
            raise RunError(
                f"{step['member']}: {step['step']} was begun before the predictors were written: remove both"
            )


def _open(out: Path) -> None:
    check_folder(out, ["members", "stages", ".locks", *(f"{name}.csv" for name in TABLES), PLAN], _MARKER, create=True)
    if not (out / _MARKER).exists():
        write_text(out / _MARKER, json.dumps({"schema_version": _SCHEMA}) + "\n")


def _work(runs: Sequence[MemberRun], stopped: Callable[[], bool] = lambda: False) -> None:
    """Make every member that no other process is making, until all are finished or `stopped`."""
    import torch

    torch.set_num_threads(1)  # an organism's products are too small to share
    left = list(runs)
    while left and not stopped():
        for run in list(left):
            with ExitStack() as held:
                try:
                    held.enter_context(locked(run.path))
                except InUseError:
                    continue
                if not run.finished and not stopped():
                    run.run()
                if run.finished:
                    left.remove(run)
        if left and not stopped():
            time.sleep(_POLL_SECONDS)


def _work_on(request: Request, note: Note, stopped: Callable[[], bool]) -> None:
    _work(request.runs(note=note), stopped)
