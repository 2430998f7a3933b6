"""Notebook 00: the words of its figure. One request is an example, so that nothing is claimed of any other."""

from __future__ import annotations

from collections.abc import Sequence

from casa_mech.reports.claim import Heading, span
from casa_mech.study import Study
from probes.gate.looks import Look

_SURFACES = {"image": "picture", "audio": "clip"}


def look_heading(study: Study, looks: Sequence[Look]) -> Heading:
    """v_s of each prompt that was looked at, and what safety attention reads most in it."""
    names = [_name(seen) for seen in looks]
    values = ", ".join(f"{name} {seen.v_s:.2f}" for name, seen in zip(names, looks, strict=True))
    labels = dict.fromkeys(str(seen.query.label or "unlabelled") for seen in looks)
    by_label = [
        f"{label} {span([seen.v_s for seen in looks if str(seen.query.label or 'unlabelled') == label])}"
        for label in labels
    ]
    most = "; ".join(f"{name}: {seen.most_read(2)}" for name, seen in zip(names, looks, strict=True))
    return Heading(
        f"{study.title}: v_s of this gate in {len(looks)} examples, {'; '.join(by_label)}",
        f"One request a row (n = 1 each): examples, not rates. v_s: {values}. Most read: {most}.",
    )


def _name(seen: Look) -> str:
    kinds = [medium.kind for medium in seen.attention.media]
    return f"{seen.query.label or 'unlabelled'} {_SURFACES[kinds[0]] if kinds else 'text'}"
