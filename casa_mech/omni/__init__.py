"""The model under study: the only package that knows what Qwen2.5-Omni looks like.

Names are loaded when they are first used: media and a checkpoint's config are looked at without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
