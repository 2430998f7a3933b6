"""Hidden states of many queries.

`collect` gives one vector for each query and site, in memory (`Activations`). `ActivationStore` keeps any number of
positions, tokens of the reply included, in a folder that pandas and safetensors read; a stopped run goes on.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
