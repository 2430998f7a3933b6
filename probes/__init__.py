"""Probes: the analysis of an omni model's hidden states, and of the gate that reads them.

* `probes.activations`: hidden states of many queries, in memory or in a store on disk.
* `probes.linear`: probes on them, fitted and judged for all sites at once; the refusal direction.
* `probes.gate`: where CASA's safety attention looks, and what its decision rests on.
* `probes.lens`: the model in TransformerLens; logit lens, tuned lens, attention heads.
* `probes.prefill`: what an attacker's opening does to states, gate and replies.

Names are loaded when they are first used, so `import probes` costs nothing. A first probe: `help(probes.fit_probe)`.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("casa-mech")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
