"""Where the repository is, and the public data files if they are there."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "figures"
DATA = Path(os.environ.get("CASA_MECH_DATA") or ROOT.parent / "shared" / "data")
"""The folder of public sets, in their published layout. Tests that need one that is not there skip."""
HAS_DATA = DATA.is_dir() and any(DATA.iterdir())
"""Whether any set is there; an empty folder is how continuous integration hides them."""
