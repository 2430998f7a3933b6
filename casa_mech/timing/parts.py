"""`casa-mech bench`: the benchmarks by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from casa_mech.errors import InputError
from casa_mech.omni import load_omni
from casa_mech.timing.gate import measure

PARTS = ("gate", "defenses", "probes", "lens", "prefill")


def measure_parts(
    parts: Sequence[str], model: str = "organism", repeats: int = 5, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """The benchmarks that `parts` names ("all" for every one), each in its own section; the gate's at the top.

    Raises:
        InputError: an unknown part; the known ones are listed.
    """
    wanted = PARTS if "all" in parts else tuple(dict.fromkeys(parts))
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise InputError(f"no benchmark {unknown[0]!r}; there are {', '.join(PARTS)}, and all")
    found = measure(model, repeats, device, dtype) if "gate" in wanted else {"model": model, "repeats": repeats}
    return found | {part: _part(part, model, repeats, device, dtype) for part in wanted if part != "gate"}


def _part(part: str, model: str, repeats: int, device: str, dtype: str) -> Any:
    if part == "defenses":
        from casa_mech.timing.defenses import measure_defenses

        return measure_defenses(model, repeats=repeats, device=device, dtype=dtype)
    if part == "prefill":
        from casa_mech.timing.prefill import measure_prefill

        return measure_prefill(model, repeats, device, dtype)
    omni = load_omni(model, device=device, dtype=dtype)
    if part == "probes":
        from casa_mech.timing.probes import measure_probes

        return measure_probes(omni, repeats)
    from casa_mech.timing.lens import measure_extraction

    return measure_extraction(omni, repeats)
