"""Linear probes and directions in hidden states.

`LogisticProbe` and its siblings are scikit-learn classifiers of one vector, `AttentionProbe` and `MaxProbe` of a
prompt's tokens; `fit_batch`, `cross_validate` and `transfer_matrix` fit the former for all sites at once.
`find_refusal_direction` finds a direction that can be removed and added, `steer` adds any, `fit_erasure` takes away all
that is linear.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
