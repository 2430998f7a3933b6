# What `import casa_mech` offers; lazy_loader reads this file, and so do type checkers.
from .attacks import apply_attack
from .casa import Casa, CasaConfig, TrainSettings
from .defenses import load_defense, train_defense
from .errors import CasaMechError
from .evaluation.evaluate import evaluate
from .judging import judge_all, load_judge
from .omni import GenerationSettings, Omni, load_omni
from .omni.load import load
from .organism import World
from .queries import AudioPart, Example, ImagePart, Query, Reply, TextPart, read_files, read_queries
from .study import Study

__version__: str

__all__ = [
    "AudioPart",
    "Casa",
    "CasaConfig",
    "CasaMechError",
    "Example",
    "GenerationSettings",
    "ImagePart",
    "Omni",
    "Query",
    "Reply",
    "Study",
    "TextPart",
    "TrainSettings",
    "World",
    "__version__",
    "apply_attack",
    "evaluate",
    "judge_all",
    "load",
    "load_defense",
    "load_judge",
    "load_omni",
    "read_files",
    "read_queries",
    "train_defense",
]
