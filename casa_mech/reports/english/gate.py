"""A gate on real English: CASA trained on prompts that the user brings, measured on public sets that it never saw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from casa_mech.attacks import figstep
from casa_mech.attacks.image import instruction_of
from casa_mech.attacks.seeding import query_rng
from casa_mech.casa import Casa, CasaConfig, TrainSettings
from casa_mech.casa.checkpoint import METRICS
from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import CASA, PRETRAINED, evaluate, result_rows, write_both
from casa_mech.files import check_folder, write_text, writing
from casa_mech.identity import examples_digest, key_digest
from casa_mech.judging import KeywordJudge, write_table
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.results import Row, auroc_row, value_row
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.organism.corpus import CHARACTERS, REPEAT, Corpus, corpus_record, on_surface, read_corpus
from casa_mech.queries import Example, Label, Query, TextPart, decontaminate, read_queries
from casa_mech.queries.benchmarks.locate import find_files
from casa_mech.queries.benchmarks.registry import benchmark_named
from casa_mech.reports.english.baselines import LENGTH, WORDS, Scorer, baselines, prompts_of
from casa_mech.study.folder import RunFolder
from casa_mech.study.settings import slug

Set = tuple[str, str | None]
TEXT, STRIP, SPEECH, FIGSTEP = "text", "image strip", "speech", "FigStep picture"
MANIFEST, REMOVED = "manifest.json", "removed.csv"
_TABLES = {f"{name}.{suffix}" for name in ("replies", "results") for suffix in ("parquet", "csv")}
_OUTPUTS = {"gates", ".locks", MANIFEST, REMOVED, *_TABLES}
BASELINE = "no model"
_READ_N = 50
_MOST_TOKENS, _REPEAT_TOKENS = 16, 48


@dataclass(frozen=True)
class Panel:
    """A harmful and a benign set, held against each other on `surfaces`."""

    name: str
    harmful: Set
    benign: Set
    surfaces: tuple[str, ...] = (TEXT,)


PANELS = (
    Panel("AdvBench ~ Alpaca", ("advbench", None), ("refusal-direction-harmless", "test")),
    Panel("XSTest unsafe ~ safe", ("xstest", "unsafe"), ("xstest", "safe")),
    Panel("SafeBench ~ benign twin", ("safebench", "harm"), ("figstep-benign", None), (TEXT, STRIP, SPEECH, FIGSTEP)),
)
"""SafeBench without legal, financial and medical advice, which break a policy and are no harm of themselves."""


@dataclass(frozen=True)
class GateSizes:
    """How much is trained and measured.

    examples, steps, batch: CASA's training. n: prompts of each set as text; n_media: as pictures or speech.
    """

    examples: int = 4000
    steps: int = 300
    batch: int = 32
    n: int = 500
    n_media: int = 150
    batch_size: int = 16


@dataclass(frozen=True)
class EnglishResult:
    """replies: of the model without and with the gate. rows: the result schema. record: what the manifest says."""

    replies: pd.DataFrame
    rows: list[Row]
    record: dict[str, Any] = field(default_factory=dict)


def english_gate(
    model: str | Path,
    data: Path,
    out: Path,
    *,
    sizes: GateSizes = GateSizes(),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Train CASA on real prompts as plain text, measure it on sets that it never saw, and write all of it to `out`.

    Args:
        model: what speaks English: a sibling that was built from the same folder, a hub id or a directory.
        data: folder of public prompt sets (see `organism.corpus.read_corpus`).
        out: gets the gate in `gates`, `replies` and `results` as parquet and CSV, `removed.csv` (the prompts taken out
            of the training set, and what they match) and `manifest.json`. A training that was stopped there is
            continued, and a finished gate of the same data and settings is only measured.
        sizes: how much.
        seed: of draws and training.
        device, dtype: as for `load_omni`.
        progress: whether to draw training's bar.

    Returns:
        The manifest's record, with `results`, the table to read.

    Raises:
        InputError: no training prompts or none of the evaluation sets in `data`. RunError: `out` holds other files.
    """
    check_folder(out, _OUTPUTS, create=True)
    corpus = read_corpus(data, seed)
    sets = evaluation_sets(data)
    omni = load_omni(str(model), device=device, dtype=dtype)
    named = {"/".join(filter(None, part)): queries for part, queries in sets.items()}
    # The corpus was decontaminated as a whole; this shows it on what is trained on.
    examples, again = decontaminate(corpus.examples(sizes.examples, seed), named)
    casa = trained_gate(omni, examples, out, sizes, seed, progress)
    found = measure(omni, casa, sets, sizes, seed, baselines(examples))
    record = {
        "model": str(model),
        "fingerprint": omni.fingerprint(),
        "seed": seed,
        "sizes": vars(sizes),
        "corpus": corpus_record(corpus),
        "examples": len(examples),
        "examples_removed": len(again.removed),
        "evaluation_sets": {name: len(queries) for name, queries in named.items()},
        **found.record,
    }
    _write(out, found, corpus, record)
    return {**record, "out": str(out), "results": english_table(pd.DataFrame(found.rows)).to_dict("records")}


def evaluation_sets(data: Path) -> dict[Set, list[Query]]:
    """The sets of `PANELS` that are in `data`, whole.

    Raises:
        InputError: not one pair is there; the message names the sets.
    """
    wanted = dict.fromkeys(part for panel in PANELS for part in (panel.harmful, panel.benign))
    found = {
        part: read_queries(part[0], data, part[1]) for part in wanted if find_files(benchmark_named(part[0]), data)
    }
    if not any({panel.harmful, panel.benign} <= set(found) for panel in PANELS):
        pairs = "; ".join(f"{panel.harmful[0]} with {panel.benign[0]}" for panel in PANELS)
        raise InputError(f"{data}: no pair of evaluation sets; put one there: {pairs} (casa-mech datasets says where)")
    return found


def measure(
    omni: Omni,
    casa: Casa,
    sets: Mapping[Set, Sequence[Query]],
    sizes: GateSizes,
    seed: int,
    scorers: Mapping[str, Scorer] | None = None,
) -> EnglishResult:
    """The gate on every panel that `sets` allows: v_s, flags and replies, and what the model can read at all.

    `scorers` are baselines that see the plain prompts (`english_baselines`); their AUROCs stand beside the gate's.

    The judge is the keyword judge: `attack_success` is an upper bound, and a model that answers everything with a stub
    "succeeds" wherever it does not refuse.
    """
    tables, rows = [], []
    missing, left_out = [], {}
    for panel in PANELS:
        absent = [name for name, _ in (part for part in (panel.harmful, panel.benign) if part not in sets)]
        if absent:
            missing.append(f"{panel.name}: {', '.join(absent)} not in the folder")
            continue
        for surface in panel.surfaces:
            queries, skipped = _panel_queries(panel, surface, sets, sizes, seed)
            if skipped:
                left_out[f"{panel.name}, {surface}"] = skipped
            tables += _answers(omni, casa, queries, panel.name, surface, sizes)
            if surface == TEXT:
                rows += _baseline_rows(omni, queries, panel.name, scorers or {}, seed)
            with casa.disabled():
                rows += _character_errors(omni, queries, panel.name, surface, sizes, seed)
    replies = pd.concat(tables, ignore_index=True)
    rows = result_rows(replies, seed) + rows
    return EnglishResult(replies, rows, {"missing_sets": missing, "cannot_be_drawn": left_out})


def english_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A table to read: a row a panel and surface; AUROC and rates as `value [low, high] n=`. Empty for no rows."""
    if rows.empty:
        return rows
    wanted = {
        "gate AUROC": ("gate_auroc", CASA, "both"),
        "token AUROC": ("token_auroc", CASA, "both"),
        "words alone": (WORDS, BASELINE, "both"),
        "length alone": (LENGTH, BASELINE, "both"),
        "FPR at 95 % TPR": ("gate_fpr_at_95tpr", CASA, "both"),
        "harmful flagged": ("flagged", CASA, "harmful"),
        "benign flagged": ("flagged", CASA, "benign"),
        "not refused, before": ("attack_success", PRETRAINED, "harmful"),
        "not refused, CASA": ("attack_success", CASA, "harmful"),
        "benign refused, before": ("over_refusal", PRETRAINED, "benign"),
        "benign refused, CASA": ("over_refusal", CASA, "benign"),
        "character errors": ("character_error_rate", PRETRAINED, "both"),
    }
    lines = []
    for (attack, surface), part in rows.groupby(["attack", "surface"], sort=False):
        line = {"sets": attack, "surface": surface}
        for name, (metric, defense, label) in wanted.items():
            row = part[(part["metric"] == metric) & (part["defense"] == defense) & (part["label"] == label)]
            line[name] = "–" if row.empty else Estimate.of(row.iloc[0]).text(".3f", row.iloc[0]["n"])
        lines.append(line)
    return pd.DataFrame(lines)


def trained_gate(
    omni: Omni, examples: Sequence[Example], out: Path, sizes: GateSizes, seed: int, progress: bool
) -> Casa:
    """CASA trained on `examples` and attached to `omni`: the one in `out`, or trained now."""
    settings = TrainSettings(
        max_steps=sizes.steps, batch_size=sizes.batch, micro_batch_size=min(16, sizes.batch), seed=seed
    )
    key = {
        "model": omni.fingerprint(),
        "examples": examples_digest(examples),
        "train": settings.model_dump(mode="json"),
        "casa": CasaConfig().model_dump(mode="json"),
    }
    name = slug(omni.source)

    def train(folder: Path) -> None:
        work = out / "gates" / f"training-{name}-{key_digest(key)}"
        work.mkdir(parents=True, exist_ok=True)
        casa = Casa.attach(omni, CasaConfig(), seed)
        try:
            casa.train(examples, settings, out=work, resume=True, progress=progress)
            casa.save_pretrained(folder)
        finally:
            casa.detach()
        shutil.copy(work / METRICS, folder / METRICS)
        shutil.rmtree(work)

    return Casa.from_pretrained(RunFolder(out).artifact("gates", name, key, train), omni)


def _panel_queries(
    panel: Panel, surface: str, sets: Mapping[Set, Sequence[Query]], sizes: GateSizes, seed: int
) -> tuple[list[Query], int]:
    """The queries of a panel on `surface`, and how many could not be drawn or spoken."""
    n = sizes.n if surface == TEXT else sizes.n_media
    queries: list[Query] = []
    skipped = 0
    labels: tuple[tuple[Label, Set], ...] = (("harmful", panel.harmful), ("benign", panel.benign))
    for label, part in labels:
        whole = [query for query in sets[part] if surface == TEXT or set(query.text.lower()) <= set(CHARACTERS)]
        skipped += len(sets[part]) - len(whole)
        order = np.random.default_rng([seed, 23]).permutation(len(whole))[:n]
        queries += [dressed(whole[place], label, surface, panel.name, seed) for place in sorted(order)]
    return queries, skipped


def dressed(query: Query, label: Label, surface: str, attack: str, seed: int, task: str = "request") -> Query:
    """A plain prompt on `surface`, to be answered or repeated; `meta["request"]` keeps the prompt."""
    meta = {"request": query.text, "surface": surface, "attack": attack}
    if surface == FIGSTEP:
        drawn = figstep(query)
        if task == "repeat":
            parts = (drawn.parts[0], TextPart(text=REPEAT["image"]))
            drawn = drawn.model_copy(update={"parts": parts})
            meta["request"] = instruction_of(query)
    else:
        kind = {TEXT: "text", STRIP: "image", SPEECH: "audio"}[surface]
        text = query.text if surface == TEXT else query.text.lower()
        drawn = on_surface(text, kind, task, query_rng(query, seed, surface), label)
    return drawn.model_copy(update={"id": query.id, "source": query.source, "label": label, "meta": meta})


def _answers(
    omni: Omni, casa: Casa, queries: Sequence[Query], attack: str, surface: str, sizes: GateSizes
) -> list[pd.DataFrame]:
    settings = GenerationSettings(max_new_tokens=_MOST_TOKENS, batch_size=sizes.batch_size)
    shared: dict[str, Any] = {"judge": KeywordJudge(), "settings": settings}
    found = [evaluate(omni, casa, queries, defense=CASA, **shared).replies]
    with casa.disabled():
        found.insert(0, evaluate(omni, None, queries, defense=PRETRAINED, **shared).replies)
    return [table.assign(attack=attack, surface=surface) for table in found]


def _baseline_rows(
    omni: Omni, queries: Sequence[Query], attack: str, scorers: Mapping[str, Scorer], seed: int
) -> list[Row]:
    prompts, harmful = prompts_of(queries)
    shared: dict[str, Any] = {
        "model": omni.source,
        "defense": BASELINE,
        "attack": attack,
        "surface": TEXT,
        "seed": seed,
    }
    return [
        auroc_row(**shared, metric=metric, scores=score(prompts).tolist(), labels=harmful)
        for metric, score in scorers.items()
    ]


def _character_errors(
    omni: Omni, queries: Sequence[Query], attack: str, surface: str, sizes: GateSizes, seed: int
) -> list[Row]:
    """Character error rate of repeating these prompts: what the model reads of the surface. At most 50, both labels."""
    from rapidfuzz.distance import Levenshtein

    some = queries[:: max(1, len(queries) // min(_READ_N, sizes.n_media))]
    plain = [Query.from_text(query.meta["request"], id=query.id, source=query.source) for query in some]
    asked = [dressed(query, "benign", surface, attack, seed, "repeat") for query in plain]
    settings = GenerationSettings(max_new_tokens=_REPEAT_TOKENS, batch_size=sizes.batch_size)
    wanted = [query.meta["request"].lower() for query in asked]
    said = [reply.text.strip().lower() for reply in omni.generate(asked, settings)]
    errors = [Levenshtein.distance(*pair) / max(1, len(pair[1])) for pair in zip(said, wanted, strict=True)]
    estimate = mean_interval(errors, None, seed)
    row = value_row(
        model=omni.source, defense=PRETRAINED, attack=attack, surface=surface, label="both",
        metric="character_error_rate", seed=seed, n=len(errors), **estimate._asdict(),
    )  # fmt: skip
    return [row]


def _write(out: Path, found: EnglishResult, corpus: Corpus, record: Mapping[str, Any]) -> None:
    write_both(found.replies, out / "replies")
    for suffix in ("parquet", "csv"):
        write_table(found.rows, out / f"results.{suffix}")
    removed = [vars(entry) for report in corpus.reports for entry in report.removed]
    with writing(out / REMOVED) as temporary:
        pd.DataFrame(removed, columns=["id", "evaluation", "match", "kind", "share"]).to_csv(temporary, index=False)
    write_text(out / MANIFEST, json.dumps(record, indent=2) + "\n")
