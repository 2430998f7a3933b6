"""What a probe or gate must beat: prompt length alone, and the words of the prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from casa_mech.queries import Query
from probes.linear.words import words_classifier

Scorer = Callable[[Sequence[str]], np.ndarray]
LENGTH, WORDS = "length_auroc", "words_auroc"


def baselines(training: Sequence[Query]) -> dict[str, Scorer]:
    """Scores [n] of prompts [n] by name of metric, higher for more harmful, from training prompts of both labels.

    `LENGTH`: the number of characters, with the sign that training shows. `WORDS`: a logistic regression on TF-IDF of
    words and word pairs (scikit-learn).
    """
    texts = [query.text for query in training]
    harmful = np.array([query.label == "harmful" for query in training])
    lengths = np.array([len(text) for text in texts], dtype=float)
    sign = 1.0 if lengths[harmful].mean() >= lengths[~harmful].mean() else -1.0
    model = words_classifier().fit(texts, harmful)
    return {
        LENGTH: lambda prompts: sign * np.array([len(text) for text in prompts], dtype=float),
        WORDS: lambda prompts: np.asarray(model.decision_function(list(prompts))),
    }
