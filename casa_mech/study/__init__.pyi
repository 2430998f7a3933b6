# What `import casa_mech.study` offers; lazy_loader reads this file, and so do type checkers.
from .settings import PROFILES as PROFILES
from .settings import StudySettings as StudySettings
from .study import Study as Study

__all__ = ["PROFILES", "Study", "StudySettings"]
