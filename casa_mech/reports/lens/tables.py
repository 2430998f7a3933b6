"""Notebook 09: the safety tokens through depth, the heads behind them, and what is drawn of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.draws import Draw
from casa_mech.evaluation.evaluate import CASA
from casa_mech.identity import key_digest
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.results import value_row
from casa_mech.judging.stats import auroc_interval, cluster_of
from casa_mech.queries import Query
from casa_mech.reports.topics import CHOOSING
from casa_mech.study.settings import slug
from casa_mech.study.study import LABELS, Study

HEAD_SURFACES = ("text", "image", "audio")
TOP_HEADS = 3
FROM_TEXT = "tuned lens of text"
"""The lens whose translators were fitted on plain text, where it reads another surface."""
KL_EPOCHS = 3
_TABLES = ("depth", "quality", "heads", "patterns")


@dataclass(frozen=True)
class LensTables:
    """What was measured, one row a query and place."""

    depth: pd.DataFrame
    """Logits of the safety tokens by depth and lens (`probes.lens.logit.Trajectory.table`): the logit lens, the tuned
    lens of the surface's own prompts, and off text that of text (`FROM_TEXT`)."""
    quality: pd.DataFrame
    """How far the lenses are from the model's own prediction (`probes.lens.tuned.lens_quality`)."""
    heads: pd.DataFrame
    """What is lost without each head (`probes.lens.heads.HeadEffects.table`)."""
    patterns: pd.DataFrame
    """Attention from the gate's position of the `TOP_HEADS` heads with most support, chosen on text and seen topics:
    `query_id, label, surface, topic, layer, head, role, share`."""


def lens_tables(study: Study, model: str = "") -> LensTables:
    """The lens on CASA's gate: made on the first call, then found in the run folder."""
    model = model or study.settings.model
    key = {
        **study.model_key(model),
        "n": study.sizes.n_probe,
        "gate": key_digest(study.gate_key(model)),
        "draws": [Draw.LENS_MEASUREMENT, Draw.LENS_TRANSLATORS],
        "kl_epochs": KL_EPOCHS,
        "fitted_on": list(study.surfaces),
        "ablation_means": "surface and role",
        "surfaces": _head_surfaces(study),
        "top": TOP_HEADS,
    }

    def build(folder: Path) -> None:
        for name, table in vars(_measure(study, model)).items():
            table.to_parquet(folder / f"{name}.parquet")

    folder = study.folder.artifact("lens", slug(model), key, build)
    return LensTables(*(pd.read_parquet(folder / f"{name}.parquet") for name in _TABLES))


def _measure(study: Study, model: str) -> LensTables:
    from probes.lens.heads import ablate_heads, attention_patterns
    from probes.lens.logit import TUNED_LENS, logit_lens
    from probes.lens.transformer_bridge import bridge
    from probes.lens.tuned import fit_translators, lens_quality

    casa = study.casa(model)
    lens, n, size = bridge(casa.omni), study.sizes.n_probe, study.sizes.batch_size
    fits = {
        surface: fit_translators(lens, casa.omni, queries, kl_epochs=KL_EPOCHS, batch_size=size)
        for surface, queries in _fitting_queries(study, n).items()
    }
    depth, quality = [], []
    for surface in study.surfaces:
        queries = _queries(study, (surface,), n)
        tuned = {TUNED_LENS: fits[surface]} | ({FROM_TEXT: fits["text"]} if surface != "text" else {})
        depth.append(logit_lens(lens, casa, queries, None, size).table())
        depth += [logit_lens(lens, casa, queries, maps, size, name).table() for name, maps in tuned.items()]
        quality.append(lens_quality(lens, casa.omni, queries, tuned, size))
    some = _queries(study, _head_surfaces(study), max(1, n // 2))
    heads = ablate_heads(lens, casa, some, batch_size=size).table()
    patterns = attention_patterns(lens, casa.omni, some, best_heads(heads), size)
    known = {query.id: {"surface": query.meta["surface"], "topic": str(cluster_of(query))} for query in some}
    shares = [
        {"query_id": pattern.query_id, "label": pattern.label, **known[pattern.query_id]}
        | {"layer": pattern.layer, "head": pattern.head, "role": role, "share": share}
        for pattern in patterns
        for role, share in pattern.shares().items()
    ]
    return LensTables(
        pd.concat(depth, ignore_index=True), pd.concat(quality, ignore_index=True), heads, pd.DataFrame(shares)
    )


def _fitting_queries(study: Study, n: int) -> dict[str, list[Query]]:
    """For each surface `2 * n` requests like those of training, that its translators are fitted on."""
    seed = Draw.LENS_TRANSLATORS + study.settings.seed
    text = study.data.texts(2 * n, seed)
    return {surface: study.attacked(attack, text, seed) for surface, attack in study.surfaces.items()}


def _head_surfaces(study: Study) -> list[str]:
    return [surface for surface in HEAD_SURFACES if surface in study.surfaces]


def _queries(study: Study, surfaces: Iterable[str], n: int) -> list[Query]:
    """`n` requests of each label on each surface, named by it, with ids of their own."""
    return [
        query.model_copy(update={"id": f"{surface}-{query.id}", "meta": {**query.meta, "surface": surface}})
        for surface in surfaces
        for label in LABELS
        for query in study.queries(study.surfaces[surface], label, n, Draw.LENS_MEASUREMENT)
    ]


def best_heads(heads: pd.DataFrame, count: int = TOP_HEADS) -> list[tuple[int, int]]:
    """The heads whose mean support of the logit is greatest on text, of the prompts that a choice is made on."""
    part = heads[(heads["surface"] == "text") & heads["split"].isin(CHOOSING)]
    means = part.groupby(["layer", "head"])["support_logit"].mean().sort_values(ascending=False)
    return [(int(layer), int(head)) for layer, head in means.index[:count]]


def depth_data(tables: LensTables, seed: int) -> pd.DataFrame:
    """What `plots.plot_depth` draws; intervals are bootstraps over topics."""
    rows: list[dict[str, Any]] = []
    groups = ["surface", "lens", "site", "depth"]
    for where, part in tables.depth.groupby(groups, sort=False):
        shared = dict(zip(groups, where, strict=True))
        harmful, topics = (part["label"] == "harmful").tolist(), part["topic"].tolist()
        found = auroc_interval(part["difference"].tolist(), harmful, topics, seed)
        rows.append({"measure": "auroc", "label": "both", **shared, "n": len(part), **found._asdict()})
        for label, own in part.groupby("label", sort=False):
            found = mean_interval(own["difference"].to_numpy(), own["topic"].tolist(), seed)
            rows.append({"measure": "difference", "label": label, **shared, "n": len(own), **found._asdict()})
    return pd.DataFrame(rows)


def quality_data(tables: LensTables, seed: int) -> pd.DataFrame:
    """What `plots.plot_quality` draws."""
    inner = tables.quality[tables.quality["depth"] < tables.quality["depth"].max()]
    return _means(inner, ["surface", "lens", "site", "depth"], "kl", seed)


def head_data(tables: LensTables, seed: int) -> pd.DataFrame:
    """What `plots.plot_heads` draws: every head on every surface, over all topics."""
    from probes.lens.heads import MEASURES, summarise_heads

    return pd.concat(
        [
            summarise_heads(part, measure, seed).assign(surface=surface)
            for measure in MEASURES
            for surface, part in tables.heads.groupby("surface", sort=False)
        ],
        ignore_index=True,
    )


def attention_data(tables: LensTables, seed: int) -> pd.DataFrame:
    """What `plots.plot_attention` draws."""
    return _means(tables.patterns, ["surface", "layer", "head", "label", "role"], "share", seed)


def lens_rows(study: Study, depth: pd.DataFrame, heads: pd.DataFrame) -> list[dict[str, object]]:
    """The figures' values in the result schema; `attack` holds the depth or the head."""
    shared: dict[str, Any] = {"model": study.settings.model, "defense": CASA, "seed": study.settings.seed}
    rows = [
        value_row(
            **shared, attack=f"{row.lens}, depth {row.depth}", surface=row.surface, label=row.label,
            metric=f"lens_{row.measure}", n=row.n, value=row.value, low=row.low, high=row.high,
        )
        for row in depth.itertuples()
    ]  # fmt: skip
    return rows + [
        value_row(
            **shared, attack=f"without head {row.layer}.{row.head}", surface=row.surface, label="both",
            metric=f"head_support_{row.measure}", n=row.n, value=row.mean, low=row.low, high=row.high,
        )
        for row in heads.itertuples()
    ]  # fmt: skip


def _means(table: pd.DataFrame, groups: Sequence[str], column: str, seed: int) -> pd.DataFrame:
    rows = []
    for where, part in table.groupby(list(groups), sort=False):
        found = mean_interval(part[column].to_numpy(), part["topic"].tolist(), seed)
        rows.append({**dict(zip(groups, where, strict=True)), "n": len(part), **found._asdict()})
    return pd.DataFrame(rows)
