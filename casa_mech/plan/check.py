"""What a plan holds and what a study would make of it, before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

from casa_mech.errors import InputError
from casa_mech.plan.own_data import OwnData
from casa_mech.plan.records import WORLD, read_plan
from casa_mech.queries import Label
from casa_mech.queries.overlap import overlaps

_PARTS = {
    "pairs": "07 (patching, paths, heads), 08",
    "kinds": "01 (kinds of harm)",
    "benign sets": "01 (several benign sets)",
    "exact judge": "04 (agreement of judges)",
}
"""The notebooks that a part of the plan is for."""


def checked_plan(plan: str, note: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Every set of a plan read and counted, with what training loses to evaluation and what notebooks leave out.

    Args:
        plan: the name of a shipped plan, or a YAML file.
        note: called with what was left out of a set, one line each.

    Returns:
        `plan`, `sets` (part, set, label, n), `training` (by label: prompts, how many were taken out because an
        evaluation set has them, how many are left), `overlaps` between evaluation sets, `attack table` (its columns)
        and `left out` (what the plan gives no notebook, in a sentence).

    Raises:
        InputError: the micro-world's plan, which has no file, or as `OwnData.check`.
    """
    if plan == WORLD:
        raise InputError(f"the plan '{WORLD}' draws its prompts and has no sets to check; give english or a .yaml file")
    data = OwnData(read_plan(plan), note)
    data.check()
    counts = data.counts()
    removed = data.removed()
    training = [
        {
            "label": label,
            "prompts": removed[cast(Label, label)].n,
            "in evaluation sets": len(removed[cast(Label, label)].removed),
            "left": len(data.training_prompts(cast(Label, label))),
        }
        for label in get_args(Label)
    ]
    shared = [
        {"set": entry.first, "and": entry.second, "same": entry.exact, "nearly": entry.near}
        for entry in overlaps(data.evaluation_sets())
        if entry.exact + entry.near > 0 and (entry.exact, entry.n_second) != (entry.n_first, entry.exact)
    ]
    missing = [
        {"notebook": place, "left out": reason} for part, place in _PARTS.items() if (reason := data.lacks(part))
    ]
    table = [{"column": name, "media": ", ".join(sorted(data.media(name))) or "text"} for name in data.attacks]
    return {
        "plan": data.name, "sets": counts, "training": training, "overlaps": shared, "attack table": table,
        "left out": missing,
    }  # fmt: skip
