"""The study: `Study`, what the notebooks share, and what runs them (settings, run folder, manifest, runner, doctor)."""

import lazy_loader

# The runner and the run folder load without torch, which `Study` needs.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
