"""Probes: the analysis of a model's hidden states, and of the gate that reads them.

    model = casa_mech.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    probe = probes.train(model, harmful=["...", ...], benign=["...", ...])
    print(probe.report(), probe("a prompt"))

* `probes.activations`: hidden states of many queries, in memory or in a store on disk.
* `probes.linear`: probes on them, fitted and judged for all sites at once; directions, steering, erasure.
* `probes.detector`: `train`, a probe on one's own prompts, with its report, thresholds and file.
* `probes.gate`: where CASA's safety attention looks, and what its decision rests on.
* `probes.lens`: the model in TransformerLens; logit lens, tuned lens, attention heads.
* `probes.prefill`: what an attacker's opening does to states, gate and replies.

Names are loaded when they are first used, so `import probes` costs nothing. A first probe: `help(probes.train)`.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("casa-mech")
__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __dir__() -> list[str]:
    """What there is and what is loaded on use, for tab completion."""
    return sorted({*globals(), *__all__})
