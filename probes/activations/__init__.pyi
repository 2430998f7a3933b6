from .index import INDEX_COLUMNS
from .memory import Activations, collect, collect_tokens
from .store import ActivationStore

__all__ = ["INDEX_COLUMNS", "ActivationStore", "Activations", "collect", "collect_tokens"]
