"""The second grid: CASA with one thing changed at a time, and the paper's attention × safety prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd

from casa_mech.compare.systems import REFERENCE, ComparedSystem
from casa_mech.errors import InputError

PROMPT_AXIS = "attention and safety prompt"
BASE = REFERENCE
NO_ATTENTION = "ssft-token"
ABLATION_SEEDS = (0, 1, 2)
"""Of training and draws, unless others are named. Variants are trained as the rows of the comparison."""
_SETTINGS: Mapping[str, tuple[tuple[str, dict[str, Any]], ...]] = MappingProxyType(
    {
        "form": (
            ("mean", {"form": "mean"}), ("top_k", {"form": "top_k"}), ("pooled", {}), ("compete", {"form": "compete"}),
        ),
        "rule": (
            ("scale", {"rule": "scale"}), ("replace", {"rule": "replace", "ce_support": "two_way"}), ("add_log", {}),
            ("scale_above", {"rule": "scale_above"}),
        ),
        "query": (
            ("pooled_text_hidden", {}), ("input_embedding_rows", {"query_source": "input_embedding_rows"}),
            ("lm_head_rows", {"query_source": "lm_head_rows"}), ("learned_free", {"query_source": "learned_free"}),
        ),
        "positions": (
            ("user+header", {}), ("user", {"positions": "user"}), ("header", {"positions": "header"}),
            ("all", {"positions": "all"}),
        ),
        "beta": (
            ("0.2", {"beta": 0.2}), ("0.38", {"beta": 0.38}), ("0.5", {}), ("0.8", {"beta": 0.8}),
        ),
    }
)  # fmt: skip
AXES = ("prompt", "form", "rule", "query", "layer", "positions", "beta", "size")
FEW = ("form=mean", "rule=scale", "beta=0.8", "size=1/8")
"""The variants of a notebook without committed tables, beside attention × safety prompt."""


@dataclass(frozen=True)
class Variant:
    """One level of one axis, and the row that measures it. The base is a level of every axis."""

    axis: str
    """What is changed."""
    level: str
    """To what."""
    system: ComparedSystem
    """The row."""

    @property
    def name(self) -> str:
        """As in `FEW`: axis and level."""
        return f"{self.axis}={self.level}"


def variants(
    n_layers: int, n_examples: int, axes: Sequence[str] = AXES, only: Sequence[str] | None = None
) -> list[Variant]:
    """The levels of the axes for a model of `n_layers` blocks.

    Args:
        n_layers: of the model; layers are its first, middle and last block, and the states after the final norm.
        n_examples: size of the training set; the axis `size` takes an eighth, a quarter and a half of it too.
        axes: which axes.
        only: names of the variants to keep beside the base (`axis=level`); None keeps all. `prompt` is kept whole.

    Raises:
        InputError: an unknown axis or variant; the known ones are listed.
    """
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise InputError(f"unknown ablation {unknown[0] if unknown else ''!r}; ablations: {', '.join(AXES)}")
    levels: list[Variant] = []
    for axis in axes:
        levels += _prompts() if axis == "prompt" else _levels(axis, n_layers, n_examples)
    if only is not None:
        names = [variant.name for variant in levels]
        odd = next((name for name in only if name not in names), None)
        if odd is not None:
            raise InputError(f"unknown variant {odd!r}; there are {', '.join(names)}")
        varied = {name.partition("=")[0] for name in only}
        levels = [
            variant
            for variant in levels
            if variant.axis == PROMPT_AXIS
            or variant.name in only
            or (variant.axis in varied and variant.system.label == BASE)
        ]
    return levels


def systems_of(variants: Sequence[Variant]) -> list[ComparedSystem]:
    """The rows of the variants, each once, the base first."""
    unique = {variant.system.label: variant.system for variant in variants}
    unique = {BASE: ComparedSystem(defense=BASE), **unique}
    return list(unique.values())


def ablation_frame(summary: pd.DataFrame, variants: Sequence[Variant]) -> pd.DataFrame:
    """The summary by variant: its columns, with `axis`, `level` and `base` (whether it is the base) in front."""
    by_variant = []
    for variant in variants:
        rows = summary[summary["defense"] == variant.system.label]
        by_variant.append(rows.assign(axis=variant.axis, level=variant.level, base=variant.system.label == BASE))
    frame = pd.concat(by_variant, ignore_index=True)
    return frame[["axis", "level", "base", *summary.columns]]


def _prompts() -> list[Variant]:
    levels = {
        "attention": ComparedSystem(defense=BASE),
        "attention + prompt": ComparedSystem(defense=BASE, safety_prompt=True),
        "no attention": ComparedSystem(defense=NO_ATTENTION),
        "no attention + prompt": ComparedSystem(defense=NO_ATTENTION, safety_prompt=True),
    }
    return [Variant(PROMPT_AXIS, level, system) for level, system in levels.items()]


def _levels(axis: str, n_layers: int, n_examples: int) -> list[Variant]:
    if axis == "layer":
        blocks = dict.fromkeys((0, n_layers // 2, n_layers - 1))
        changes = [(f"block {block}", {"layer": block}) for block in blocks]
        return [_variant(axis, level, change) for level, change in (*changes, ("norm", {}))]
    if axis == "size":
        sizes = {f"1/{share}": max(4, n_examples // share) for share in (8, 4, 2)}
        return [
            *(Variant(axis, level, _named(axis, level, examples=n)) for level, n in sizes.items()),
            _variant(axis, "all", {}),
        ]
    return [_variant(axis, level, change) for level, change in _SETTINGS[axis]]


def _variant(axis: str, level: str, change: dict[str, Any]) -> Variant:
    return Variant(axis, level, _named(axis, level, training=change) if change else ComparedSystem(defense=BASE))


def _named(axis: str, level: str, **fields: Any) -> ComparedSystem:
    return ComparedSystem(defense=BASE, name=f"{BASE}, {axis} {level}", **fields)
