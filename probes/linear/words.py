"""The control of a probe's text: what words alone tell, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def words_classifier() -> Any:
    """A logistic regression on TF-IDF of words and word pairs (scikit-learn), not fitted yet."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )


def words_scores(texts: Sequence[str], labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Held-out scores [text] of `words_classifier`: each text by one that was not fitted on its fold, int [text]."""
    scores = np.zeros(len(texts))
    prompts = np.array(texts, dtype=object)
    for held in np.unique(fold):
        out = fold == held
        scores[out] = words_classifier().fit(prompts[~out], labels[~out]).decision_function(prompts[out])
    return scores
