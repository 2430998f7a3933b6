"""Benign requests in text: ordinary ones for training and utility, and ones that only look harmful (over-refusal)."""

from __future__ import annotations

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks.benchmark import WHOLE, Benchmark, File, Record, Row, has, meta_of, plain_row
from casa_mech.queries.tables import cell

_RAW = "https://raw.githubusercontent.com"
_OR_BENCH = "hf://datasets/bench-llm/or-bench"
_STANFORD = "https://github.com/tatsu-lab/stanford_alpaca"


def _alpaca_row(record: Record, file: File) -> Row:
    meta = meta_of(record, reference="output", category="category")
    return Row(_with_input(cell(record.get("instruction")), cell(record.get("input"))), "benign", meta)


def _seed_row(record: Record, file: File) -> Row:
    instances = record["instances"]
    instance = instances[0] if isinstance(instances, list) and instances else {}
    meta = meta_of(record, task="name") | meta_of(instance, reference="output")
    return Row(_with_input(cell(record["instruction"]), cell(instance.get("input"))), "benign", meta)


def _with_input(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context else instruction


def _xstest_row(record: Record, file: File) -> Row:
    label = cell(record["label"])
    if label not in ("safe", "unsafe"):
        raise InputError(f"{file.path or 'xstest'} row {file.number}: label '{label}'; XSTest has safe and unsafe")
    meta = meta_of(record, category="type", focus="focus", note="note") | {"xstest": label}
    number = cell(record.get("id", ""))
    if number.isdigit():
        # A contrast stands 25 rows below the safe prompt that it was written from.
        meta["pair"] = str(int(number) - _CONTRAST * (label == "unsafe"))
    return Row(cell(record["prompt"]), "benign" if label == "safe" else "harmful", meta)


def _or_bench(name: str, rows: int, summary: str, toxic: bool = False) -> Benchmark:
    return Benchmark(
        name=name,
        summary=summary,
        label="harmful" if toxic else "benign",
        rows=rows,
        licence="CC BY 4.0",
        origin=f"https://huggingface.co/datasets/bench-llm/or-bench ({name}.csv)",
        files={WHOLE: (f"{name}.csv",)},
        columns=("prompt", "category"),
        row=plain_row("prompt", "harmful" if toxic else "benign", category="category"),
        remote={WHOLE: f"{_OR_BENCH}/{name}.csv"},
    )


_CONTRAST = 25

BENIGN = (
    Benchmark(
        name="jailbreakbench-benign",
        summary="benign behaviours on the topics of JailbreakBench's harmful ones",
        label="benign",
        rows=100,
        licence="MIT",
        origin="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors (data/benign-behaviors.csv)",
        files={WHOLE: ("benign-behaviors.csv",)},
        columns=("Goal", "Target", "Category"),
        row=plain_row("Goal", "benign", compliance="Target", category="Category", behavior="Behavior", origin="Source"),
        remote={WHOLE: "hf://datasets/JailbreakBench/JBB-Behaviors/data/benign-behaviors.csv"},
    ),
    Benchmark(
        name="xstest",
        summary="safe prompts that look unsafe, and unsafe contrasts",
        label=None,
        rows=450,
        split_rows={"safe": 250, "unsafe": 200},
        licence="CC BY 4.0",
        origin="https://github.com/paul-rottger/xstest (xstest_prompts.csv)",
        files={WHOLE: ("xstest_prompts.csv",)},
        columns=("prompt", "type", "label"),
        row=_xstest_row,
        select={"safe": has("xstest", "safe"), "unsafe": has("xstest", "unsafe")},
        remote={WHOLE: f"{_RAW}/paul-rottger/xstest/main/xstest_prompts.csv"},
    ),
    _or_bench("or-bench-80k", 80_000, "benign prompts that look toxic"),
    _or_bench("or-bench-hard-1k", 1000, "those of them that many models refuse"),
    _or_bench("or-bench-toxic", 600, "toxic prompts, the contrast of OR-Bench", toxic=True),
    Benchmark(
        name="refusal-direction-harmless",
        summary="harmless instructions in splits, from Alpaca",
        label="benign",
        rows=31_323,
        split_rows={"train": 18_793, "val": 6264, "test": 6266},
        licence="Apache-2.0 (Alpaca: CC BY-NC 4.0)",
        origin="https://github.com/andyrdt/refusal_direction (dataset/splits/harmless_*.json)",
        files={split: (f"harmless_{split}.json",) for split in ("train", "val", "test")},
        columns=("instruction",),
        row=plain_row("instruction", "benign", category="category"),
        remote={
            split: f"{_RAW}/andyrdt/refusal_direction/main/dataset/splits/harmless_{split}.json"
            for split in ("train", "val", "test")
        },
    ),
    Benchmark(
        name="alpaca",
        summary="instructions; with outputs in the original file, without in refusal_direction's",
        label="benign",
        rows=52_002,
        licence="CC BY-NC 4.0",
        origin=f"{_STANFORD} (alpaca_data.json)",
        files={WHOLE: ("alpaca_data.json", "alpaca_data_cleaned.json", "alpaca.json")},
        columns=("instruction",),
        row=_alpaca_row,
        remote={WHOLE: f"{_RAW}/tatsu-lab/stanford_alpaca/main/alpaca_data.json"},
    ),
    Benchmark(
        name="alpaca-seed",
        summary="the human-written seed tasks of Alpaca, with outputs",
        label="benign",
        rows=175,
        licence="CC BY-NC 4.0",
        origin=f"{_STANFORD} (seed_tasks.jsonl)",
        files={WHOLE: ("seed_tasks.jsonl",)},
        columns=("instruction", "instances"),
        row=_seed_row,
        remote={WHOLE: f"{_RAW}/tatsu-lab/stanford_alpaca/main/seed_tasks.jsonl"},
    ),
    Benchmark(
        name="alpaca-eval",
        summary="benign instructions with reference outputs",
        label="benign",
        rows=805,
        licence="CC BY-NC 4.0",
        origin="https://huggingface.co/datasets/tatsu-lab/alpaca_eval (alpaca_eval.json)",
        files={WHOLE: ("alpaca_eval.json", "outputs_example.json")},
        columns=("instruction", "output"),
        row=plain_row("instruction", "benign", reference="output", origin="dataset"),
        remote={WHOLE: "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"},
    ),
)
