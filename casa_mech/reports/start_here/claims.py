"""Notebook 00: the words of its figure. One request is an example, so that nothing is claimed of any other."""

from __future__ import annotations

from collections.abc import Sequence

from casa_mech.reports.claim import Heading
from casa_mech.study import Study
from probes.gate.looks import Look

_SURFACES = {"image": "picture", "audio": "clip"}


def look_heading(study: Study, looks: Sequence[Look]) -> Heading:
    """v_s of each prompt that was looked at, and what safety attention reads most in it."""
    names = [_name(seen) for seen in looks]
    values = ", ".join(f"{name} {seen.v_s:.2f}" for name, seen in zip(names, looks, strict=True))
    most = "; ".join(f"{name}: {seen.most_read(2)}" for name, seen in zip(names, looks, strict=True))
    return Heading(
        f"{study.name}: v_s that this gate reads in {len(looks)} examples: {values}",
        f"One request a row (n = 1 each): examples, not rates. Most read: {most}.",
    )


def _name(seen: Look) -> str:
    kinds = [medium.kind for medium in seen.attention.media]
    return f"{seen.query.label or 'unlabelled'} {_SURFACES[kinds[0]] if kinds else 'text'}"
