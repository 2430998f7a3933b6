"""Linear probes and directions in hidden states.

`fit_probe` is a probe on one's own prompts. `LogisticProbe` and its siblings are scikit-learn classifiers; `fit_batch`,
`cross_validate` and `transfer_matrix` fit them for all sites at once. `find_refusal_direction` finds a direction that
can be removed and added.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
