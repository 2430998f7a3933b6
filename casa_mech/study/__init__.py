"""The study: `Study`, what the notebooks share, and what runs them (settings, run folder, manifest, runner, doctor)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casa_mech.study.settings import PROFILES, StudySettings
    from casa_mech.study.study import Study

__all__ = ["PROFILES", "Study", "StudySettings"]


def __getattr__(name: str) -> Any:
    # The runner and the run folder load without torch, which `Study` needs.
    if name == "Study":
        from casa_mech.study.study import Study

        return Study
    if name in __all__:
        from casa_mech.study import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
