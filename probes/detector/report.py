"""What a probe's AUROC has to be read beside: the other layers, and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from casa_mech.display import table_html
from casa_mech.errors import InputError
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.stats import auroc_interval
from probes.linear.control_task import control_task
from probes.linear.validation import Chance, matched_auroc
from probes.linear.words import words_scores

SHUFFLED, LENGTH, MATCHED, WORDS, TASK = (
    "labels shuffled, best layer", "length alone", "prompts of equal length", "words alone", "control task",
)  # fmt: skip


@dataclass(frozen=True)
class ProbeReport:
    """AUROC of a probe on prompts that it had not seen, by layer, beside its controls; prints itself."""

    title: str
    """The probe, the model and the prompts."""
    nested: Estimate
    """AUROC of the whole procedure, the choice of layer and penalty included, with its interval over topics."""
    layers: pd.DataFrame
    """One row a site: `site, auroc, low, high, n`, `permuted, permuted_low, permuted_high, p` (labels shuffled: mean
    and middle 95 %; NaN without deals), `folds` (how many folds chose it) and `chosen` (whether the probe reads it). Of
    a probe of tokens they are a logistic probe's on the mean over them, by which its layer is chosen."""
    controls: pd.DataFrame
    """One row each: `control, auroc, low, high, n, note`."""

    def __str__(self) -> str:
        lines = [f"{self.title}: AUROC {self.nested.text('.3f')}", "", f"{'layer':>10}  AUROC of prompts not seen"]
        for row in self.layers.to_dict("records"):
            chance = "" if np.isnan(row["permuted"]) else f"  shuffled labels up to {row['permuted_high']:.3f}"
            chosen = f"  <- chosen (in {row['folds']} of {self.layers['folds'].sum()} folds)" if row["chosen"] else ""
            interval = Estimate(row["auroc"], row["low"], row["high"]).text(".3f")
            lines.append(f"{row['site']:>10}  {interval}{chance}{chosen}")
        lines += ["", f"{'control':>28}  AUROC"]
        for row in self.controls.to_dict("records"):
            interval = Estimate(row["auroc"], row["low"], row["high"]).text(".3f", row["n"])
            value = "not known" if np.isnan(row["auroc"]) else interval
            lines.append(f"{row['control']:>28}  {value}{'; ' + row['note'] if row['note'] else ''}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f"{self.title}: AUROC {self.nested.text('.3f')}"
        return table_html(self.layers.round(3), title, False) + table_html(self.controls.round(3), "Controls", False)


def control_table(
    decisions: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    fold: np.ndarray,
    lengths: np.ndarray,
    texts: Sequence[str],
    states: np.ndarray,
    chance: Chance | None,
    seed: int = 0,
) -> pd.DataFrame:
    """The controls of a probe, one row each; what cannot be had is a row of NaN whose note says why.

    Args:
        decisions: [row], held-out. labels: bool [row]. clusters: [row]. fold: int [row].
        lengths: [row], tokens of the prompts. texts: [row], "" where a prompt has none.
        states: [row, d_model] at the chosen site.
        chance: labels shuffled, at all sites; None: left out. seed: of the draws.
    """
    n = len(labels)
    rows: list[tuple[object, ...]] = []
    if chance is not None:
        # The best of all sites, as the probe's is: the p of a choice among many.
        best = chance.aurocs.max(axis=0)
        low, high = np.quantile(best, (0.025, 0.975))
        p = (1 + (best >= chance.own.max() - 1e-12).sum()) / (1 + len(best))
        rows.append((SHUFFLED, best.mean(), low, high, n, f"p = {p:.3g} for the probe's best layer"))
    rows.append((LENGTH, *auroc_interval(list(lengths), list(labels), list(clusters), seed), n, "tokens of the prompt"))
    *matched, pairs = matched_auroc(decisions, labels, lengths.astype(float), clusters, seed)
    note = f"the probe, over {pairs} pairs" if pairs else "no two prompts of both classes have one length"
    rows.append((MATCHED, *matched, n, note))
    rows.append(_words(labels, clusters, fold, texts, seed))
    try:
        task = control_task(states[None], labels, clusters, seed=seed)
        means = task.control[0]
        note = f"random labels by topic, against {task.task[0]:.3f} on the same prompts"
        rows.append((TASK, means.mean(), means.min(), means.max(), task.n, note))
    except InputError:
        rows.append((TASK, np.nan, np.nan, np.nan, 0, "needs topics of both classes with two prompts or more"))
    return pd.DataFrame(rows, columns=["control", "auroc", "low", "high", "n", "note"])


def _words(
    labels: np.ndarray, clusters: np.ndarray, fold: np.ndarray, texts: Sequence[str], seed: int
) -> tuple[str, float, float, float, int, str]:
    missing = (WORDS, np.nan, np.nan, np.nan, 0)
    if not all(texts):
        return (*missing, "some prompts have no text")
    try:
        scores = words_scores(texts, labels, fold)
    except ValueError:  # scikit-learn: no word of two letters
        return (*missing, "the prompts have no words")
    auroc = auroc_interval(list(scores), list(labels), list(clusters), seed)
    return (WORDS, *auroc, len(labels), "logistic regression on TF-IDF, the same folds")
