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
from casa_mech.judging import KeywordJudge, read_table, write_table
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.results import Row, auroc_row, value_row
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.organism.corpus import CHARACTERS, REPEAT, Corpus, corpus_record, on_surface, read_corpus
from casa_mech.queries import Example, Label, Query, TextPart, decontaminate, read_queries
from casa_mech.queries.benchmarks.locate import DATA_VARIABLE, data_folder, find_files
from casa_mech.queries.benchmarks.registry import benchmark_named
from casa_mech.reports.real_english.baselines import Scorer, baselines, prompts_of
from casa_mech.reports.real_english.tables import BASELINE, english_table
from casa_mech.study import Study
from casa_mech.study.folder import RunFolder
from casa_mech.study.settings import slug

Set = tuple[str, str | None]
"""A public set by its name, and a part of it or None for the whole."""
TEXT, STRIP, SPEECH, FIGSTEP = "text", "image strip", "speech", "FigStep picture"
MANIFEST, REMOVED = "manifest.json", "removed.csv"
_TABLES = {f"{name}.{suffix}" for name in ("replies", "results") for suffix in ("parquet", "csv")}
_OUTPUTS = {"gates", ".locks", MANIFEST, REMOVED, *_TABLES}
_READ_N = 50
_MOST_TOKENS, _REPEAT_TOKENS = 16, 48


@dataclass(frozen=True)
class Panel:
    """A harmful and a benign set, held against each other."""

    name: str
    """What tables and figures call it."""
    harmful: Set
    """The harmful set: its name, and a part of it or None."""
    benign: Set
    """The benign set."""
    surfaces: tuple[str, ...] = (TEXT,)
    """The surfaces that their prompts are put on."""


PANELS = (
    Panel("AdvBench ~ Alpaca", ("advbench", None), ("refusal-direction-harmless", "test")),
    Panel("XSTest unsafe ~ safe", ("xstest", "unsafe"), ("xstest", "safe")),
    Panel("SafeBench ~ benign twin", ("safebench", "harm"), ("figstep-benign", None), (TEXT, STRIP, SPEECH, FIGSTEP)),
)
"""SafeBench without legal, financial and medical advice, which break a policy and are no harm of themselves."""


@dataclass(frozen=True)
class GateSizes:
    """How much is trained and measured."""

    examples: int = 4000
    """CASA's training examples."""
    steps: int = 300
    """Optimiser steps of CASA's training."""
    batch: int = 32
    """Examples in a step."""
    n: int = 500
    """Prompts of each set as text."""
    n_media: int = 150
    """Prompts of each set as pictures or speech."""
    batch_size: int = 16
    """Queries in one forward or generation."""


@dataclass(frozen=True)
class EnglishResult:
    """A gate's measurement on public sets."""

    replies: pd.DataFrame
    """Of the model without and with the gate."""
    rows: list[Row]
    """The result schema."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the manifest says of it: sets that are missing, and prompts that cannot be drawn."""


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
    result = measure(omni, casa, sets, sizes, seed, baselines(examples))
    record = {
        "model": str(model),
        "fingerprint": omni.fingerprint(),
        "seed": seed,
        "sizes": vars(sizes),
        "corpus": corpus_record(corpus),
        "examples": len(examples),
        "examples_removed": len(again.removed),
        "evaluation_sets": {name: len(queries) for name, queries in named.items()},
        **result.record,
    }
    _write(out, result, corpus, record)
    return {**record, "out": str(out), "results": english_table(pd.DataFrame(result.rows)).to_dict("records")}


def english_panel(study: Study, model: str = "", data: str = "") -> tuple[pd.DataFrame, str]:
    """The rows of `english_gate` for a notebook, made once in the run folder, and a sentence on them.

    Without a folder of data, or with a model that does not read English, there are no rows; the sentence says why.

    Args:
        study: whose run folder and sizes are used.
        model: default the one under study.
        data: default the folder that CASA_MECH_DATA names.

    Raises:
        InputError: as `english_gate`; a folder of data that is not there.
    """
    model = model or study.settings.model
    folder = Path(data) if data else data_folder()
    if folder is None:
        return (
            pd.DataFrame(),
            f"no panel on real English: no folder of prompt sets (parameter data, or {DATA_VARIABLE})",
        )
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the folder of prompt sets, or an empty text to go without")
    if study.omni(model).speaks_micro_world:
        why = f"{slug(model)} knows the micro-world's words alone"
        return pd.DataFrame(), f"no panel on real English: {why}; name a model that reads it (parameter english)"
    sizes = GateSizes(
        examples=2 * study.sizes.train_examples,
        steps=study.sizes.train_steps,
        n=study.sizes.n_eval,
        n_media=max(6, study.sizes.n_eval // 4),
    )
    settings = study.settings
    key = {"model": study.omni(model).fingerprint(), "seed": settings.seed, "sizes": vars(sizes), "data": str(folder)}
    work = study.folder.path("english", slug(model))

    def build(new: Path) -> None:
        shared: dict[str, Any] = {"seed": settings.seed, "device": settings.device, "dtype": settings.dtype}
        english_gate(model, folder, work, sizes=sizes, progress=study.progress, **shared)
        shutil.copy(work / "results.parquet", new)
        shutil.copy(work / MANIFEST, new)

    kept = study.folder.artifact("english-rows", slug(model), key, build)
    record = json.loads((kept / MANIFEST).read_text(encoding="utf-8"))
    note = f"{slug(model)}: {record['corpus']['removed']} training prompts taken out, which are in evaluation sets"
    return read_table(kept / "results.parquet"), "; ".join([note, *record["missing_sets"]])


def evaluation_sets(data: Path) -> dict[Set, list[Query]]:
    """The sets of `PANELS` that are in `data`, whole.

    Raises:
        InputError: not one pair is there; the message names the sets.
    """
    named = dict.fromkeys(each for panel in PANELS for each in (panel.harmful, panel.benign))
    sets = {
        (name, part): read_queries(name, data, part) for name, part in named if find_files(benchmark_named(name), data)
    }
    if not any({panel.harmful, panel.benign} <= set(sets) for panel in PANELS):
        pairs = "; ".join(f"{panel.harmful[0]} with {panel.benign[0]}" for panel in PANELS)
        raise InputError(f"{data}: no pair of evaluation sets; put one there: {pairs} (casa-mech datasets says where)")
    return sets


def measure(
    omni: Omni,
    casa: Casa,
    sets: Mapping[Set, Sequence[Query]],
    sizes: GateSizes,
    seed: int,
    scorers: Mapping[str, Scorer] | None = None,
) -> EnglishResult:
    """The gate on every panel that `sets` allows: v_s, flags and replies, and what the model can read at all.

    `scorers` are baselines that see the plain prompts (`baselines`); their AUROCs stand beside the gate's.

    The judge is the keyword judge: `attack_success` is an upper bound, and a model that answers everything with a stub
    "succeeds" wherever it does not refuse.
    """
    tables, rows = [], []
    missing, left_out = [], {}
    for panel in PANELS:
        absent = [each[0] for each in (panel.harmful, panel.benign) if each not in sets]
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
    for label, name in labels:
        drawable = [query for query in sets[name] if surface == TEXT or set(query.text.lower()) <= set(CHARACTERS)]
        skipped += len(sets[name]) - len(drawable)
        order = np.random.default_rng([seed, 23]).permutation(len(drawable))[:n]
        queries += [rendered(drawable[place], label, surface, panel.name, seed) for place in sorted(order)]
    return queries, skipped


def rendered(query: Query, label: Label, surface: str, attack: str, seed: int, task: str = "request") -> Query:
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
    """Replies without and with the gate."""
    settings = GenerationSettings(max_new_tokens=_MOST_TOKENS, batch_size=sizes.batch_size)
    shared: dict[str, Any] = {"judge": KeywordJudge(), "settings": settings}
    gated = evaluate(omni, casa, queries, defense=CASA, **shared).replies
    with casa.disabled():
        plain = evaluate(omni, None, queries, defense=PRETRAINED, **shared).replies
    return [table.assign(attack=attack, surface=surface) for table in (plain, gated)]


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
    to_repeat = [rendered(query, "benign", surface, attack, seed, "repeat") for query in plain]
    settings = GenerationSettings(max_new_tokens=_REPEAT_TOKENS, batch_size=sizes.batch_size)
    prompts = [query.meta["request"].lower() for query in to_repeat]
    replies = [reply.text.strip().lower() for reply in omni.generate(to_repeat, settings)]
    errors = [Levenshtein.distance(*pair) / max(1, len(pair[1])) for pair in zip(replies, prompts, strict=True)]
    estimate = mean_interval(errors, None, seed)
    row = value_row(
        model=omni.source, defense=PRETRAINED, attack=attack, surface=surface, label="both",
        metric="character_error_rate", seed=seed, n=len(errors), **estimate._asdict(),
    )  # fmt: skip
    return [row]


def _write(out: Path, result: EnglishResult, corpus: Corpus, record: Mapping[str, Any]) -> None:
    write_both(result.replies, out / "replies")
    for suffix in ("parquet", "csv"):
        write_table(result.rows, out / f"results.{suffix}")
    removed = [vars(entry) for report in corpus.reports for entry in report.removed]
    with writing(out / REMOVED) as temporary:
        pd.DataFrame(removed, columns=["id", "evaluation", "match", "kind", "share"]).to_csv(temporary, index=False)
    write_text(out / MANIFEST, json.dumps(record, indent=2) + "\n")
