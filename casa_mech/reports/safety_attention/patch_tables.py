"""Notebook 07: tables of patching, by span, by head and path, by attribution, and from one surface to another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from casa_mech.attacks.seeding import paired
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.judging.bootstrap import bootstrap_interval, mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.hypothesis import PERMUTATIONS
from casa_mech.study.study import Study
from probes.gate.pairs import MatchedPair, aligned_pairs
from probes.gate.patching import ESTIMATED, INSERT, MEASURES, PatchEffects, patch_effects
from probes.gate.paths import DIRECT, INDIRECT, path_effects
from probes.gate.surfaces import surface_effects

PATCHED = ("text", "image", "audio")
"""Surfaces on which states are exchanged."""
WHOLE = "whole prompt"
"""The span of a patch that exchanges all of them."""
TOTAL = "total"
"""The effect of exchanging a head's output, whichever way it goes."""
PATHS = (TOTAL, DIRECT, INDIRECT)
HARMFUL_TEXT, BENIGN_TEXT = "harmful text", "benign text"
"""Whose states a picture's or clip's run gets: those of its own request as text, or of its benign counterpart."""


def patched_surfaces(study: Study) -> dict[str, str]:
    """Surfaces on which states are exchanged, of those that the study has, and their attacks."""
    return {surface: attack for surface, attack in study.surfaces.items() if surface in PATCHED}


def matched_pairs(
    study: Study, attack: str, n: int, tries: int = 8, draw: int = Draw.GATE_MEASUREMENT
) -> list[MatchedPair]:
    """Up to `n` harmful requests under `attack`, each with a benign counterpart that differs in the key word alone.

    The two prompts have the same layout: phrasing, verb, article, and on a picture or in a clip as many tokens. The
    requests are those of `draw`.

    Raises:
        InputError: no request has such a counterpart.
    """
    omni = study.omni()
    # Half of the clips or more have no counterpart of as many tokens.
    requests = study.data.paired_prompts(2 * n, draw + study.settings.seed)
    waiting = list(requests)
    pairs: dict[str, MatchedPair] = {}
    for attempt in range(tries):
        proposed = [
            (query, other) for query in waiting if (other := study.data.counterparts(query, attempt)) is not None
        ]
        if not proposed:
            break
        harmful, benign = (list(side) for side in zip(*proposed, strict=True))
        both = [study.attacked(attack, side, study.settings.seed) for side in paired(harmful, benign)]
        candidates = [MatchedPair(*pair) for pair in zip(*both, strict=True)]
        try:
            pairs |= {pair.harmful.id: pair for pair in aligned_pairs(omni, candidates)}
        except InputError:
            continue
        waiting = [query for query in waiting if query.id not in pairs]
    if not pairs:
        raise InputError(f"no request under {attack!r} has a benign counterpart of the same layout: add requests")
    return [pairs[query.id] for query in requests if query.id in pairs][:n]


def patching(study: Study, n: int) -> pd.DataFrame:
    """`PatchEffects` of every surface in `PATCHED`, `n` pairs at most each: its columns and `surface`."""

    def build() -> pd.DataFrame:
        casa = study.casa()
        tables = [
            patch_effects(casa, matched_pairs(study, attack, n)).effects.assign(surface=surface)
            for surface, attack in patched_surfaces(study).items()
        ]
        return pd.concat(tables, ignore_index=True)

    return study.gate_table("patching", {"n": n, "measures": list(MEASURES), "estimated": list(ESTIMATED)}, build)


def paths(study: Study, n: int) -> pd.DataFrame:
    """`path_effects` of every surface in `PATCHED`, on the pairs of `patching`: its columns and `surface`."""

    def build() -> pd.DataFrame:
        casa = study.casa()
        tables = [
            path_effects(casa, matched_pairs(study, attack, n)).assign(surface=surface)
            for surface, attack in patched_surfaces(study).items()
        ]
        return pd.concat(tables, ignore_index=True)

    return study.gate_table("paths", {"n": n, "measures": list(MEASURES)}, build)


def path_data(effects: pd.DataFrame, split: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean effects of each head's harmful output on the benign run, by path, with intervals over topics.

    Args:
        effects: of `patching`; gives the total.
        split: of `paths`.
        seed: of the bootstrap.

    Returns:
        Columns `surface, site, head, path` (of `PATHS`), `n`, and for the log-odds of v_s and the
        token's logit difference `mean, low, high` after `delta_<measure>_`, and `gap_<measure>`.
    """
    total = PatchEffects(effects).deltas().assign(path=TOTAL)
    total = total[(total["head"] >= 0) & (total["direction"] == INSERT)]
    gaps = {
        (surface, measure): float((rows[f"{measure}_donor"] - rows[measure]).mean())
        for surface, rows in total.groupby("surface")
        for measure in ESTIMATED
    }
    rows = []
    everything = pd.concat([total, split], ignore_index=True)
    for (surface, site, head, path), group in everything.groupby(["surface", "site", "head", "path"], sort=False):
        row: dict[str, Any] = {"surface": surface, "site": site, "head": head, "path": path, "n": len(group)}
        for measure in ESTIMATED:
            row[f"gap_{measure}"] = gaps[surface, measure]
            mean = mean_interval(group[f"delta_{measure}"].to_numpy(), group["topic"].tolist(), seed)
            row |= dict(zip((f"delta_{measure}_{end}" for end in ("mean", "low", "high")), mean, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def span_data(effects: pd.DataFrame, last: int, seed: int) -> pd.DataFrame:
    """The share of v_s's log-odds that each span carries after the last block, surface by surface.

    Args:
        effects: of `patching`. last: the last block's number. seed: of the bootstrap.

    Returns:
        Columns `surface, span, n, gap` (mean difference of the log-odds between the two runs), `value, low, high`: the
        mean change by the span's exchange over that gap, topics drawn anew.
    """
    rows = PatchEffects(effects).deltas()
    rows = rows[(rows["direction"] == INSERT) & (rows["site"] == str(last)) & (rows["head"] < 0)]
    records = []
    for (surface, span), group in rows[rows["span"] != WHOLE].groupby(["surface", "span"], sort=False):
        change = group["delta_log_odds"].to_numpy()
        gap = (group["log_odds_donor"] - group["log_odds"]).to_numpy()

        def share(weights: np.ndarray, change: np.ndarray = change, gap: np.ndarray = gap) -> np.ndarray:
            return (weights @ change) / (weights @ gap)

        low, high = bootstrap_interval(share, group["topic"].tolist(), len(group), seed)
        estimate = Estimate(float(change.sum() / gap.sum()), low, high).widened()
        records.append({"surface": surface, "span": span, "n": len(group), "gap": gap.mean(), **estimate._asdict()})
    return pd.DataFrame(records)


def estimates(effects: pd.DataFrame) -> pd.DataFrame:
    """Attribution patching beside true patching, harm put into the benign run: a row a pair, target and measure.

    Returns:
        `pair, topic, surface, part` (where states are exchanged, in words), `target` (site, head and span), `measure`
        (`ESTIMATED`), `patched` and `estimated` (changes). Without the whole prompt's residual stream, which makes the
        donor's run, and without exchanges of states that do not differ.
    """
    rows = PatchEffects(effects).deltas()
    stream = rows["site"].str.fullmatch(r"embeddings|\d+")
    rows = rows[(rows["direction"] == INSERT) & ~(stream & (rows["span"] == WHOLE))]
    kept = rows[["pair", "topic", "surface"]].assign(
        part=[_part(str(site)) for site in rows["site"]],
        target=rows["site"] + " " + rows["head"].astype(str) + " " + rows["span"],
    )
    tables = [
        kept.assign(measure=name, patched=rows[f"delta_{name}"], estimated=rows[f"{name}_estimated"])
        for name in ESTIMATED
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[(table["patched"].abs() > 1e-6) | (table["estimated"].abs() > 1e-6)].reset_index(drop=True)


def _part(site: str) -> str:
    """A site in words; attentions and MLPs, of which a block has one each, together."""
    kind, _, layer = site.partition(".")
    if kind == "z":
        return f"heads of block {layer}"
    single = {"attention": "attention", "mlp": "MLP", "embeddings": "input"}
    return single.get(kind, f"stream after block {site}")


def agreement(points: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Correlation of attribution patching with true patching, by surface and measure, in all and part by part.

    Args:
        points: of `estimates`.
        seed: of the bootstrap over topics.

    Returns:
        Columns `surface, measure, part` ("all" or a part), `n` (points), `pairs`, `value, low, high` (Pearson's r),
        `same_sign` (share of the points) and `slope` (of the patched change on the estimated one, through 0).
    """
    rows = []
    for (surface, measure), of_both in points.groupby(["surface", "measure"], sort=False):
        for part, group in [("all", of_both), *of_both.groupby("part", sort=False)]:
            true, estimated = group["patched"].to_numpy(), group["estimated"].to_numpy()
            if min(true.std(), estimated.std()) == 0:
                continue

            def correlation(
                weights: np.ndarray, true: np.ndarray = true, estimated: np.ndarray = estimated
            ) -> np.ndarray:
                return _correlations(true, estimated, weights)

            low, high = bootstrap_interval(correlation, group["topic"].tolist(), len(group), seed)
            value = float(_correlations(true, estimated, np.ones((1, len(true))))[0])
            rows.append(
                {
                    "surface": surface, "measure": measure, "part": part, "n": len(group),
                    "pairs": group["pair"].nunique(), **Estimate(value, low, high).widened()._asdict(),
                    "same_sign": float((np.sign(true) == np.sign(estimated)).mean()),
                    "slope": float(true @ estimated / (estimated @ estimated)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def agreement_p(points: pd.DataFrame, seed: int, draws: int = PERMUTATIONS) -> float:
    """p of the correlation of estimated and patched changes on text: how often permuted targets correlate as much.

    Estimates are dealt to other targets, in every pair alike, so that the pairs of a target stay together. Targets that
    some pair lacks are left out. The changes are those of the log-odds of v_s.

    Args:
        points: of `estimates`. seed, draws: of the permutations.
    """
    rows = points[(points["surface"] == "text") & (points["measure"] == "log_odds")]
    wide = rows.pivot(index="pair", columns="target", values=["patched", "estimated"]).dropna(axis=1)
    true, estimated = (wide[name][wide["patched"].columns].to_numpy() for name in ("patched", "estimated"))
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(np.arange(true.shape[1]), (draws, 1)), axis=1)
    own = np.corrcoef(true.ravel(), estimated.ravel())[0, 1]
    dealt = [np.corrcoef(true.ravel(), estimated[:, order].ravel())[0, 1] for order in orders]
    return float((1 + (np.array(dealt) >= own - 1e-12).sum()) / (1 + draws))


def _correlations(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's r [resample] of two lists [n] under each row of `weights` [resample, n]."""
    total = weights.sum(axis=1)
    means = [weights @ values / total for values in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = weights @ (first * second) / total - means[0] * means[1]
        variances = [weights @ values**2 / total - mean**2 for values, mean in zip((first, second), means, strict=True)]
        r: np.ndarray = covariance / np.sqrt(variances[0] * variances[1])
    return r


def moved_states(study: Study, n: int) -> pd.DataFrame:
    """`surface_effects` on pictures and speech: text states put into the run of the same harmful request.

    Returns:
        Its columns, `surface`, and `donor`: `HARMFUL_TEXT` (the request itself) or `BENIGN_TEXT` (its counterpart).
    """

    def build() -> pd.DataFrame:
        casa = study.casa()
        pairs = matched_pairs(study, "plain", n)
        texts = {HARMFUL_TEXT: [pair.harmful for pair in pairs], BENIGN_TEXT: [pair.benign for pair in pairs]}
        tables = []
        for surface, attack in patched_surfaces(study).items():
            if surface == "text":
                continue
            receivers = study.attacked(attack, texts[HARMFUL_TEXT], study.settings.seed)
            tables += [
                surface_effects(casa, receivers, donors).assign(surface=surface, donor=donor)
                for donor, donors in texts.items()
            ]
        return pd.concat(tables, ignore_index=True)

    return study.gate_table("moved-states", {"n": n, "measures": list(MEASURES)}, build)


def moved_data(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean change by moved states with intervals over topics: by `surface, donor, span, site`, `n`, and each measure's.

    For the log-odds of v_s and the token's logit difference: `mean, low, high` after `delta_<measure>_`, and
    `gap_<measure>`, the donor run minus the receiving one.
    """
    rows = []
    for where, group in table.groupby(["surface", "donor", "span", "site"], sort=False):
        row: dict[str, Any] = {**dict(zip(("surface", "donor", "span", "site"), where, strict=True)), "n": len(group)}
        for name in ESTIMATED:
            row[f"gap_{name}"] = float((group[f"{name}_donor"] - group[name]).mean())
            change = (group[f"{name}_patched"] - group[name]).to_numpy()
            mean = mean_interval(change, group["topic"].tolist(), seed)
            row |= dict(zip((f"delta_{name}_{end}" for end in ("mean", "low", "high")), mean, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def patch_summary(study: Study, effects: pd.DataFrame) -> pd.DataFrame:
    """Mean effects with intervals, surface by surface (see `PatchEffects.summary`)."""
    tables = [
        PatchEffects(rows).summary(study.settings.seed).assign(surface=surface)
        for surface, rows in effects.groupby("surface", sort=False)
    ]
    return pd.concat(tables, ignore_index=True)


def residual_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of a patching summary that exchange the residual stream."""
    sites = summary["site"].str.fullmatch(r"embeddings|\d+")
    return summary[sites & (summary["span"] != WHOLE)].reset_index(drop=True)


def head_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows that put one head of the harmful run into the benign one."""
    return summary[(summary["head"] >= 0) & (summary["direction"] == INSERT)].reset_index(drop=True)
