"""A probe as a detector, on one's own prompts and model.

`train` takes texts, queries or a table and gives a `PromptProbe`: calibrated scores of prompts, and of a reply while it
is written (`watch`), a threshold for a false-positive rate (`at`), a report with controls, a plot, and a file that
knows its model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
