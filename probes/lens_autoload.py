"""Lets `TransformerBridge.boot_transformers` know Qwen2.5-Omni wherever this package is installed, imported or not.

TransformerLens 4.3 finds adapters through entry points, but only after it has looked the architecture up in its own
table and read the model's sizes from the config; both refuse Qwen2.5-Omni before our adapter is asked. So two of its
modules are mended as they are loaded. `watch` is a `torch.backends` entry point, which torch calls as it is imported:
the one hook that surely comes before TransformerLens. It puts a finder in place, loads nothing and never fails;
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns it off, and importing `probes.lens` then does the same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ARCHITECTURE = "Qwen2_5OmniThinkerForConditionalGeneration"
FULL_MODEL = "qwen2_5_omni"
"""Model type of the full Omni checkpoints, which hold the thinker beside the talker."""


def mend_table(module: ModuleType) -> None:
    """Enter the architecture into `transformer_lens.factories.architecture_adapter_factory`'s table.

    The lookup reads the names only; the adapter itself comes through the entry point.
    """
    module.SUPPORTED_ARCHITECTURES.setdefault(ARCHITECTURE, None)


def mend_reader(module: ModuleType) -> None:
    """Let `transformer_lens.utilities.hf_utils` read the thinker's config out of a full Omni checkpoint's."""
    read = module.autoconfig_with_remote_post_init_compat
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def read_thinker(*args: Any, **kwargs: Any) -> Any:
        config = read(*args, **kwargs)
        if getattr(config, "model_type", None) != FULL_MODEL:
            return config
        config.thinker_config.architectures = [ARCHITECTURE]
        return config.thinker_config

    module.autoconfig_with_remote_post_init_compat = read_thinker  # type: ignore[attr-defined]


MENDED: dict[str, Callable[[ModuleType], None]] = {
    "transformer_lens.factories.architecture_adapter_factory": mend_table,
    "transformer_lens.utilities.hf_utils": mend_reader,
}


class _Watch(MetaPathFinder):
    """Finds the modules of `MENDED` as the other finders do, and mends each right after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, or None for any other module."""
        if fullname not in MENDED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_mend(module: ModuleType) -> None:
                run(module)
                MENDED[fullname](module)

            spec.loader.exec_module = run_and_mend  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Mend TransformerLens's two modules when they are imported."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
