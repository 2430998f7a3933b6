"""CASA's internal safety decision, rebuilt and measured on omni-modal models.

The names below are what most users need; each is loaded when it is first used, so that importing the package is quick:

    from casa_mech import Casa, CasaConfig, TrainSettings, World, apply_attack, load

    omni = load("organism")
    casa = Casa.attach(omni, CasaConfig())
    casa.train(World().training_examples(2000, seed=0), TrainSettings())
    replies = casa.generate(apply_attack("audio", World().requests(4, seed=1), seed=1))

More is in the subpackages (`casa_mech.attacks`, `casa_mech.judging`, `casa_mech.trace`, ...); analyses of hidden states
are in the package `probes`.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __dir__() -> list[str]:
    """What there is and what is loaded on use, for tab completion."""
    return sorted({*globals(), *__all__})
