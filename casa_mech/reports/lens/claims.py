"""Notebook 09: the headings of its figures and its claims, each computed from the table that it stands above."""

from __future__ import annotations

import numpy as np
import pandas as pd

from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import label_permutation_test, paired_difference
from casa_mech.judging.stats import auroc_interval, aurocs_by_labels
from casa_mech.reports.claim import Claim, Heading
from casa_mech.reports.lens.tables import FROM_TEXT, LensTables, best_heads
from casa_mech.reports.topics import CHOOSING, chosen_on
from casa_mech.study import Study
from probes.lens.logit import LOGIT_LENS, TUNED_LENS


def attention_heading(study: Study, attention: pd.DataFrame) -> Heading:
    """Where the first of the heads looks on text."""
    first = attention.iloc[0]
    of_head = (attention["layer"] == first["layer"]) & (attention["head"] == first["head"])
    on_words = attention[of_head & (attention["surface"] == "text") & (attention["role"] == "text")]
    shares = on_words.set_index("label")["value"]
    return Heading(
        f"{study.title}: head {first['layer']}.{first['head']} gives {shares['harmful']:.0%} of its attention to a "
        f"harmful text's words, {shares['benign']:.0%} to a benign one's",
        "From the position of this gate; the heads with most support of the token difference on text, of the prompts "
        "that a choice is made on.",
    )


def depth_claim(study: Study, tables: LensTables, draws: int = 999) -> Claim:
    """From which depth on the tokens tell harmful from benign text: chosen on seen topics, judged on others."""
    seed = study.settings.seed
    rows = tables.depth[(tables.depth["lens"] == TUNED_LENS) & (tables.depth["surface"] == "text")]
    chosen = rows["split"].isin(CHOOSING)
    seen, others = rows[chosen], rows[~chosen]
    choice, rest = chosen_on(rows)
    last = int(rows["depth"].max())
    first = last
    # The earliest depth from which every deeper one is above chance, the whole interval.
    for depth in range(last, -1, -1):
        if _auroc(seen[seen["depth"] == depth], seed).low <= 0.5:
            break
        first = depth
    there = others[others["depth"] == first]
    auroc, at_end = _auroc(there, seed), _auroc(others[others["depth"] == last], seed)
    where = _place(str(there["site"].iloc[0]))
    return Claim(
        f"{study.title}: {where} this gate's tokens tell harmful text on {rest} with AUROC {auroc.value:.2f}",
        f"{where.capitalize()}, the first depth from which they tell it on {choice}, AUROC {auroc.text()} on {rest}; "
        f"at the end {at_end.text()}.",
        "lens_depth", len(there), *auroc,
        f"labels permuted over topics, {draws} draws", _label_permutation(there, seed, draws),
        "on fresh topics the interval at this depth holds 0.5, or an earlier depth does as well",
    )  # fmt: skip


def quality_claim(study: Study, tables: LensTables) -> Claim:
    """What translators change on pictures and speech, fitted on text or there, in KL half-way through the model.

    Of a plan that has text alone: what translators of text change there.
    """
    table, seed = tables.quality, study.settings.seed
    middle = int(table["depth"].max()) // 2
    media = table[(table["depth"] == middle) & table["surface"].isin(["image", "audio"])]
    if media.empty:
        return _text_quality_claim(study, table[table["depth"] == middle])
    by_lens = media.pivot_table(index=["query_id", "topic"], columns="lens", values="kl").reset_index()
    topics = by_lens["topic"].tolist()
    change, p = paired_difference(by_lens[FROM_TEXT], by_lens[LOGIT_LENS], topics, seed)
    own, _ = paired_difference(by_lens[TUNED_LENS], by_lens[LOGIT_LENS], topics, seed)
    plain, carried, fitted = by_lens[[LOGIT_LENS, FROM_TEXT, TUNED_LENS]].mean()
    carries = "nearer to the model than" if change.high < 0 else "no nearer to the model than"
    return Claim(
        f"{study.title}: on media the logit lens is {plain:.2f} nats from the model, tuned on text {carried:.2f}, "
        f"tuned there {fitted:.2f}",
        f"{_place(str(media['site'].iloc[0])).capitalize()}, KL(model || lens) on pictures and speech. Translators of "
        f"text are {carries} none, a change of {change.text()} nats; translators of the surface itself change it by "
        f"{own.text()}.",
        "lens_quality", len(by_lens), *change, "paired permutation over topics", p,
        "on fresh pictures and speech the change by translators of text has the other sign, or its interval holds 0",
    )  # fmt: skip


def _text_quality_claim(study: Study, rows: pd.DataFrame) -> Claim:
    by_lens = rows.pivot_table(index=["query_id", "topic"], columns="lens", values="kl").reset_index()
    change, p = paired_difference(
        by_lens[TUNED_LENS], by_lens[LOGIT_LENS], by_lens["topic"].tolist(), study.settings.seed
    )
    plain, tuned = by_lens[[LOGIT_LENS, TUNED_LENS]].mean()
    return Claim(
        f"{study.title}: on text the logit lens is {plain:.2f} nats from the model, the tuned lens {tuned:.2f}",
        f"{_place(str(rows['site'].iloc[0])).capitalize()}, KL(model || lens) on prompts that no translator was fitted "
        f"on. Translators change it by {change.text()} nats.",
        "lens_quality", len(by_lens), *change, "paired permutation over topics", p,
        "on fresh prompts the change has the other sign, or its interval holds 0",
    )  # fmt: skip


def head_claim(study: Study, tables: LensTables) -> Claim:
    """What the head chosen on seen topics does for the token difference on unseen ones."""
    ((layer, head),) = best_heads(tables.heads, 1)
    rows = tables.heads[(tables.heads["layer"] == layer) & (tables.heads["head"] == head)]
    unseen = rows[(rows["surface"] == "text") & ~rows["split"].isin(CHOOSING)]
    support = unseen["support_logit"].to_numpy()
    mean, p = paired_difference(support, np.zeros_like(support), unseen["topic"].tolist(), study.settings.seed)
    return Claim(
        f"{study.title}: without head {layer}.{head} texts move {mean.value:.2f} of this gate's token logit from their "
        "own side",
        f"The head was chosen on {chosen_on(rows)[0]}; on others its support is {mean.text()} of token logit and "
        f"{float(unseen['support_v_s'].mean()):.3f} of v_s. Support: how far a head moves harmful requests up and "
        "benign ones down, against its mean over the same role on the same surface.",
        "lens_heads", len(unseen), *mean, "intact and ablated swapped by topic", p,
        "on fresh topics the mean effect's interval holds 0, or a random head does as much",
    )  # fmt: skip


def _auroc(rows: pd.DataFrame, seed: int) -> Estimate:
    harmful = (rows["label"] == "harmful").tolist()
    return auroc_interval(rows["difference"].tolist(), harmful, rows["topic"].tolist(), seed)


def _label_permutation(rows: pd.DataFrame, seed: int, draws: int) -> float:
    """Two-sided p of the AUROC."""
    scores, harmful = rows["difference"].to_numpy(), (rows["label"] == "harmful").to_numpy()
    return label_permutation_test(
        lambda labels: np.abs(aurocs_by_labels(scores, labels) - 0.5), harmful, rows["topic"], seed, draws
    )


def _place(site: str) -> str:
    return "before block 0" if site == "embeddings" else f"after block {site}"
