"""The organism's card: what it can read, know, answer and refuse, measured on fresh draws."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from casa_mech.attacks import apply_attack
from casa_mech.attacks.prefill import PREFILL_LENGTHS
from casa_mech.errors import InputError
from casa_mech.files import check_writable, write_text
from casa_mech.judging.estimate import Estimate
from casa_mech.omni import Omni, load_omni
from casa_mech.organism.premise_rows import (
    READ_SURFACES,
    SURFACES,
    Row,
    outcomes,
    premise_rows,
    rate,
    threshold_of,
)
from casa_mech.organism.premise_rows import TITLES as PREMISE_TITLES
from casa_mech.organism.world import Task, World, default_world
from casa_mech.queries import Label, Query

SCHEMA_VERSION = 1
CARD, CARD_TEXT = "card.json", "card.md"
MIN_N = 300
CARD_SEED = 1_000_003
READING: dict[str, Task] = {"names": "name", "dangerous": "dangerous", "category": "category"}
TITLES = {
    "names": "names the word",
    "dangerous": "knows whether it is dangerous",
    "category": "knows its category",
    "answers_benign": "answers benign requests",
    "attack_success": "attack success before CASA",
}


def card(
    name: str | Omni = "organism",
    n: int = MIN_N,
    seed: int = CARD_SEED,
    out: Path | None = None,
    progress: bool = True,
    knobs: list[dict[str, object]] | None = None,
) -> dict[str, Any]:
    """Measure an organism on `n` fresh draws a row and, with `out`, write `card.json` and `card.md` there.

    Every draw has a held-out phrasing (and a held-out wrapper for `jailbreak`); split `seen` and `held_out` is that of
    the topic in safety training. Values are fractions with Wilson's 95 % interval. `premises` are the rows that have a
    threshold, with it (see `premise_rows`); `knobs` says how the organism was trained.

    Raises:
        InputError: `n` below 1. RunError: `out` cannot be written, which is tried first.
    """
    if n < 1:
        raise InputError(f"a card needs at least one draw a row, not n={n}; {MIN_N} is the default")
    if out is not None:
        check_writable(out)
    omni = load_omni(name) if isinstance(name, str) else name
    plan = list(_plan())
    from tqdm import tqdm

    bar = tqdm(plan, desc=f"card of {omni.source}", unit="row", disable=not progress)
    rows = [_measure(omni, n, seed, measure, surface, split) for measure, surface, split in bar]
    bar = tqdm(premise_rows(omni, n, seed), desc="its premises", unit="row", disable=not progress)
    premises = [row | {"threshold": threshold_of(row)} for row in [*rows, *bar]]
    record = {
        "schema_version": SCHEMA_VERSION,
        "name": omni.source,
        "fingerprint": omni.fingerprint(),
        "parameters": sum(parameter.numel() for parameter in omni.model.parameters()),
        "n": n,
        "seed": seed,
        "rows": rows,
        "premises": [row for row in premises if row["threshold"] or row["measure"] in PREMISE_TITLES],
        "prefill": [_prefill_row(omni, n, seed, k) for k in (0, *PREFILL_LENGTHS)],
    }
    if knobs is not None:
        record["knobs"] = knobs
    if out is not None:
        write_card(record, out)
    return record


def write_card(record: dict[str, Any], out: Path) -> None:
    """Write `card.json` and `card.md` into the directory `out`."""
    write_text(out / CARD, json.dumps(record, indent=1) + "\n")
    write_text(out / CARD_TEXT, card_markdown(record))


def card_markdown(record: dict[str, Any]) -> str:
    """The card as Markdown: one table for each split of topics, then attack success by prefill length."""
    lines = [
        f"# {record['name']}",
        "",
        f"{record['parameters']:,} parameters. n = {record['n']} fresh draws a cell (seed {record['seed']}), held-out",
        "phrasings and wrappers; percent with Wilson 95 % intervals.",
    ]
    for split, title in (
        ("seen", "Topics seen in safety training"),
        ("held_out", "Topics held out of safety training (what they are was learned before)"),
    ):
        lines += ["", f"## {title}", "", "| | " + " | ".join(SURFACES) + " |", "|---|" + "---|" * len(SURFACES)]
        for measure, words in TITLES.items():
            cells = [_cell(record["rows"], measure, surface, split) for surface in SURFACES]
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
    lines += ["", "## Attack success by length of the assistant prefill (plain text, seen topics)", ""]
    lines += ["| tokens | " + " | ".join(str(row["k"]) for row in record["prefill"]) + " |"]
    lines += ["|---|" + "---|" * len(record["prefill"])]
    lines += ["| | " + " | ".join(Estimate.of(row).percent() for row in record["prefill"]) + " |", ""]
    if "premises" in record:
        lines += _premises_markdown(record)
    return "\n".join(lines)


def _premises_markdown(record: dict[str, Any]) -> list[str]:
    """Each threshold beside the value, then the knobs with their reasons."""
    titles = TITLES | PREMISE_TITLES
    bound = [row for row in record["premises"] if row["threshold"]]
    missed = sum(not row["threshold"][0] <= row["value"] <= row["threshold"][1] for row in bound)
    lines = ["## Premises of CASA", "", f"{missed} of {len(bound)} thresholds are missed.", ""]
    lines += ["| | surface | topics | value | threshold | |", "|---|---|---|---|---|---|"]
    for row in record["premises"]:
        bounds, verdict = "–", ""
        if row["threshold"]:
            low, high = row["threshold"]
            bounds = f"≥ {100 * low:.0f}" if high == 1 else f"{100 * low:.0f} to {100 * high:.0f}"
            verdict = "met" if low <= row["value"] <= high else "missed"
        split, value = row["split"].replace("_", " "), Estimate.of(row).percent()
        cells = (titles[row["measure"]], row["surface"], split, value, bounds, verdict)
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if "knobs" in record:
        lines += ["## Knobs of the training", "", "| knob | value | reason |", "|---|---|---|"]
        lines += [f"| {knob['knob']} | {knob['value']} | {knob['reason']} |" for knob in record["knobs"]]
        lines.append("")
    return lines


def _plan() -> Iterable[tuple[str, str, str]]:
    for split in ("seen", "held_out"):
        for measure in READING:
            for surface in READ_SURFACES:
                yield measure, surface, split
        for measure in ("answers_benign", "attack_success"):
            for surface in SURFACES:
                yield measure, surface, split


def _measure(omni: Omni, n: int, seed: int, measure: str, surface: str, split: str) -> Row:
    world = default_world()
    if measure in READING:
        queries = _questions(world, READING[measure], n, seed, split)
    else:
        label: Label = "benign" if measure == "answers_benign" else "harmful"
        queries = world.requests(n, seed, label, topics=split, templates="held_out")  # type: ignore[arg-type]
    k = _complied(omni, apply_attack(SURFACES[surface], queries, seed, omni.tokenizer))
    return {"measure": measure, "surface": surface, "split": split, **rate(k, n)}


def _questions(world: World, task: Task, n: int, seed: int, split: str) -> list[Query]:
    """`n` questions, every second one about a harmful topic, so that a constant answer is right half of the time."""
    rng = np.random.default_rng([seed, 7])
    labels: Sequence[Label] = ("harmful", "benign")
    return [
        world.draw(task, rng, split, "held_out", labels[index % 2], id=f"card-{task}-{split}-{index}")  # type: ignore[arg-type]
        for index in range(n)
    ]


def _prefill_row(omni: Omni, n: int, seed: int, k: int) -> Row:
    queries = default_world().requests(n, seed, "harmful", topics="seen", templates="held_out")
    attack = f"prefill-{k}" if k else "plain"
    return {"k": k, **rate(_complied(omni, apply_attack(attack, queries, seed, omni.tokenizer)), n)}


def _complied(omni: Omni, queries: Sequence[Query]) -> int:
    return outcomes(omni, queries).count("complied")


def _cell(rows: Sequence[Row], measure: str, surface: str, split: str) -> str:
    for row in rows:
        if (row["measure"], row["surface"], row["split"]) == (measure, surface, split):
            return Estimate.of(row).percent()
    return "–"
