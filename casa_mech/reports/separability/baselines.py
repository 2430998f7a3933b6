"""What a gate on real English must beat: prompt length alone, and the words of the prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from casa_mech.queries import Query

Scorer = Callable[[Sequence[str]], np.ndarray]
LENGTH, WORDS = "length_auroc", "words_auroc"


def baselines(training: Sequence[Query]) -> dict[str, Scorer]:
    """Scores [n] of prompts [n] by name of metric, higher for more harmful, from training prompts of both labels.

    `LENGTH`: the number of characters, with the sign that training shows. `WORDS`: a logistic regression on TF-IDF of
    words and word pairs (scikit-learn).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = [query.text for query in training]
    harmful = np.array([query.label == "harmful" for query in training])
    lengths = np.array([len(text) for text in texts], dtype=float)
    sign = 1.0 if lengths[harmful].mean() >= lengths[~harmful].mean() else -1.0
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    model.fit(texts, harmful)
    return {
        LENGTH: lambda prompts: sign * np.array([len(text) for text in prompts], dtype=float),
        WORDS: lambda prompts: np.asarray(model.decision_function(list(prompts))),
    }


def prompts_of(queries: Sequence[Query]) -> tuple[list[str], list[bool]]:
    """The plain prompts behind queries, and whether each is harmful."""
    return [query.meta["request"] for query in queries], [query.label == "harmful" for query in queries]
