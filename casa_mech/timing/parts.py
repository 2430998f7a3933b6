"""`casa-mech bench`: the benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from casa_mech.errors import InputError
from casa_mech.omni import Omni, load_omni
from casa_mech.timing.defenses import measure_defenses
from casa_mech.timing.gate import measure_gate
from casa_mech.timing.lens import measure_extraction
from casa_mech.timing.prefill import measure_prefill
from casa_mech.timing.probes import measure_probes

PARTS: Mapping[str, Callable[[Omni, int], dict[str, Any]]] = {
    "gate": measure_gate,
    "defenses": measure_defenses,
    "probes": measure_probes,
    "lens": measure_extraction,
    "prefill": measure_prefill,
}
"""What can be measured: a function of a model of its own and of how many rounds are timed."""


def measure_parts(
    parts: Sequence[str], model: str = "organism", repeats: int = 5, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """The benchmarks that `parts` names ("all" for every one), each in its own section; the gate's at the top.

    Raises:
        InputError: an unknown part; the known ones are listed.
    """
    names = tuple(PARTS) if "all" in parts else tuple(dict.fromkeys(parts))
    for name in names:
        if name not in PARTS:
            raise InputError(f"no benchmark {name!r}; there are {', '.join(PARTS)}, and all")
    # Each on a model of its own: some attach an adapter, or take the end of a turn away.
    sections = {name: PARTS[name](load_omni(model, device=device, dtype=dtype), repeats) for name in names}
    return {"model": model, "repeats": repeats, **sections.pop("gate", {}), **sections}
