"""Progress bars: where nobody said otherwise, shown to a person and kept out of logs and executed notebooks."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

DELAY = 1.0
"""Seconds that work takes before its bar appears, unless it was asked for."""


def progress_bar(total: int, name: str, progress: bool | None = None, unit: str = "query", initial: int = 0) -> tqdm:
    """A bar of `total` steps; `progress` None: shown where a person watches (`is_watched`), if the work takes long."""
    from tqdm import tqdm

    shown = is_watched() if progress is None else progress
    delay = DELAY if progress is None else 0
    return tqdm(total=total, initial=initial, desc=name, unit=unit, disable=not shown, delay=delay)


def is_watched() -> bool:
    """True on a terminal and in a Jupyter kernel; `TQDM_DISABLE=1` switches that off."""
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return False
    ipython = sys.modules.get("IPython")
    return sys.stderr.isatty() or hasattr(ipython and ipython.get_ipython(), "kernel")
