"""MME's scores from a model's yes/no answers: per subtask 100 (accuracy + accuracy+), summed over two groups.

The rules are those of MME's own evaluation (arXiv 2306.13394): two questions an image; accuracy counts questions,
accuracy+ images with both right; an answer that is neither yes nor no is wrong. Such answers are also counted apart.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import RESAMPLES, cluster_counts, exact_reach
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.results import Row, value_row

if TYPE_CHECKING:
    import pandas as pd

MME_COLUMNS = ("subtask", "image", "question", "answer", "prediction")
MME_GROUPS = MappingProxyType(
    {
        "perception": (
            "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
        ),
        "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
    }
)  # fmt: skip
_SUBTASKS = {name: group for group, names in MME_GROUPS.items() for name in names}


def read_answer(prediction: str) -> Literal["yes", "no", "other"]:
    """A prediction as "yes" or "no" where its first four characters hold the word, as MME's script reads it."""
    opening = prediction.strip().lower()[:4]
    return "yes" if "yes" in opening else "no" if "no" in opening else "other"


def mme_scores(frame: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """MME's scores with intervals.

    Args:
        frame: a row for each question: `subtask`, `image`, `question`, `answer` (Yes or No), `prediction` (the model's
            text). As `casa_mech.queries.read_mme_results` gives.
        seed, resamples: of the bootstrap, which draws images: an image's two questions stay together.

    Returns:
        A row for each subtask and then for each group that is complete (`subtask` "all"): `group, subtask`, `n`
        (questions), `images, other` (answers that are neither), `accuracy, accuracy_plus, score, low, high`; score
        0..200 a subtask, so perception reaches 2000 and cognition 800. A group's accuracies are its subtasks' means.

    Raises:
        InputError: a missing column, an unknown subtask, an answer that is neither Yes nor No, or an image without
            exactly two questions; the message names it.
    """
    import pandas as pd

    judged = _judged(frame)
    # Right answers (0, 1, 2) of each image, by subtask, in the order of `MME_GROUPS`.
    rights = {
        name: judged[judged["subtask"] == name].groupby("image", sort=False)["right"].sum().to_numpy()
        for name in _SUBTASKS
        if (judged["subtask"] == name).any()
    }
    drawn = {name: _draws(images, [seed, place], resamples) for place, (name, images) in enumerate(rights.items())}
    rows = [_subtask(name, judged[judged["subtask"] == name], rights[name], drawn[name]) for name in rights]
    for group, names in MME_GROUPS.items():
        if set(names) <= set(rights):
            whole = np.sum([drawn[name] for name in names], axis=0)
            rows.append(_group(group, [row for row in rows if row["group"] == group], whole))
    return pd.DataFrame(rows)


def mme_rows(scores: pd.DataFrame, *, model: str, defense: str, seed: int = 0) -> list[Row]:
    """`mme_scores` in the result schema: metrics `mme_perception`, `mme_cognition` and `mme:<subtask>`; n questions."""
    return [
        value_row(
            model=model, defense=defense, attack="none", surface="image", label="benign", seed=seed,
            metric=f"mme_{row['group']}" if row["subtask"] == "all" else f"mme:{row['subtask']}",
            n=row["n"], **Estimate(row["score"], row["low"], row["high"]).widened()._asdict(),
        )
        for row in scores.to_dict("records")
    ]  # fmt: skip


def _judged(frame: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in MME_COLUMNS if name not in frame.columns]
    if missing:
        raise InputError(f"MME answers lack the column {missing[0]!r}; the columns are {', '.join(MME_COLUMNS)}")
    if frame.empty:
        raise InputError("there are no MME answers to score")
    unknown = sorted(set(frame["subtask"]) - set(_SUBTASKS))
    if unknown:
        raise InputError(f"MME has no subtask {unknown[0]!r}; its subtasks are {', '.join(_SUBTASKS)}")
    truth = frame["answer"].astype(str).str.strip().str.lower()
    if not truth.isin(["yes", "no"]).all():
        row = frame[~truth.isin(["yes", "no"])].iloc[0]
        raise InputError(f"MME {row['subtask']}, {row['image']}: the answer is {row['answer']!r}, neither Yes nor No")
    answers = frame["prediction"].fillna("").astype(str).map(read_answer)
    judged = frame[["subtask", "image"]].assign(right=answers == truth, other=answers == "other")
    counts = judged.groupby(["subtask", "image"], sort=False).size()
    if (counts != 2).any():
        (subtask, image), count = next(iter(counts[counts != 2].items()))
        raise InputError(f"MME {subtask}, {image}: {count} questions; every image has two, or accuracy+ has no meaning")
    return judged


def _score(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Score [resample] from the number of right answers of each image [image] and weights [resample, image]."""
    return 100 * (weights @ (images / 2) + weights @ (images == 2)) / weights.sum(axis=1)


def _draws(images: np.ndarray, seed: list[int], resamples: int) -> np.ndarray:
    """The score of each resample of a subtask's images; subtasks are drawn apart, since their sizes are fixed."""
    return _score(images, cluster_counts(len(images), resamples, np.random.default_rng(seed)))


def _interval(draws: np.ndarray, score: float, best: float, images: int) -> dict[str, float]:
    """`low` and `high`; a score of 0 or of `best` reaches as far as so many images without an exception exclude."""
    low, high = np.quantile(draws, [0.025, 0.975])
    reach = best * exact_reach(images)
    return {
        "low": best - reach if score == best else float(low),
        "high": reach if score == 0 else float(high),
    }


def _subtask(name: str, judged: pd.DataFrame, images: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    accuracy, plus = float(judged["right"].mean()), float((images == 2).mean())
    return {
        "group": _SUBTASKS[name], "subtask": name, "n": len(judged), "images": len(images),
        "other": int(judged["other"].sum()), "accuracy": accuracy, "accuracy_plus": plus,
        "score": 100 * (accuracy + plus), **_interval(draws, 100 * (accuracy + plus), 200, len(images)),
    }  # fmt: skip


def _group(group: str, rows: list[dict[str, Any]], draws: np.ndarray) -> dict[str, Any]:
    sums = {name: sum(row[name] for row in rows) for name in ("n", "images", "other")}
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("accuracy", "accuracy_plus")}
    score = sum(row["score"] for row in rows)
    return {
        "group": group,
        "subtask": "all",
        **sums,
        **means,
        "score": score,
        **_interval(draws, score, 200 * len(rows), sums["images"]),
    }
