"""Kill -9 of train, collect, compare and run at random moments, then the same again: the files are an unstopped run's.

`make kills` kills each of them twenty times. Seconds that something took are left out of the comparison.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from helpers.kills import command, continued, files_in

from casa_mech.omni import load_omni
from casa_mech.organism.world import default_world
from casa_mech.queries import Query
from casa_mech.study.runner import run_study
from casa_mech.study.settings import settings_of
from probes.activations import ActivationStore

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="no fork")]
PARAMETERS = "\n".join(f'{name}: str = "smoke"' for name in ("model", "out", "profile"))
NOTEBOOK = """
from casa_mech.evaluation.evaluate import result_rows
from casa_mech.study import Study
sizes = {"n_probe": 4, "train_examples": 32, "train_steps": 12, "train_batch": 8, "n_eval": 4, "max_new_tokens": 2}
study = Study.open(out, model=model, profile=profile, progress=False, sizes=sizes)
study.save_table("attacks", result_rows(study.replies(model, "CASA", "plain", "harmful")))
figures = study.folder.path("figures")
figures.mkdir(exist_ok=True)
tables = {"log": study.training_log().drop(columns="seconds"), "states": study.activation_store().frame()}
for name, table in {**tables, "readings": study.readings()}.items():
    table.to_csv(figures / f"{name}.csv", index=False)
"""


def untimed(lines: bytes) -> list[dict[str, float]]:
    """Metrics of each step, without their seconds."""
    rows = [json.loads(line) for line in lines.splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_train(random_organism: Path, tmp_path: Path) -> None:
    def train(out: Path) -> Callable[[], None]:
        options = ("checkpoint_every=2", "validate_every=5", "precision=full")
        chosen = [word for option in options for word in ("--option", option)]
        sizes = ("--steps", 20, "--batch-size", 8, "--examples", 32)
        return command("train", "--model", random_organism, "--out", out, *sizes, *chosen)

    def content(out: Path) -> dict[str, object]:
        files: dict[str, object] = dict(files_in(out, "*"))
        return {**files, "metrics.jsonl": untimed((out / "metrics.jsonl").read_bytes())}

    continued(train, tmp_path, 2, content)


def test_collect(random_organism: Path, tmp_path: Path) -> None:
    queries = [
        query.model_copy(update={"id": f"{query.id}-{number}"})
        for number in range(4)
        for query in default_world().requests(16, number)
    ]

    def collect(out: Path) -> Callable[[], None]:
        def work() -> None:
            read = ("last", "mean", "generated:2")
            ActivationStore.collect(
                load_omni(random_organism), shuffled(queries), None, read, out, batch_size=4, shard_mb=0
            )

        return work

    continued(collect, tmp_path, 2, lambda out: files_in(out, "store.json", "queries.parquet", "shards/*", "index/*"))


def shuffled(queries: list[Query]) -> list[Query]:
    """Queries whose order is not that of their length."""
    return queries[::2] + queries[1::2]


def test_compare(random_organism: Path, tmp_path: Path) -> None:
    def compare(out: Path) -> Callable[[], None]:
        rows = (
            "--defenses",
            "none,casa",
            "--attacks",
            "plain,jailbreak",
            "--seeds",
            "0",
            "--n",
            4,
            "--timing-rounds",
            0,
        )
        sizes = ("--steps", 4, "--examples", 16, "--max-new-tokens", 2, "--train-option", "checkpoint_every=1")
        return command("compare", "--model", random_organism, "--out", out, *rows, *sizes)

    def content(out: Path) -> dict[str, object]:
        def without_seconds(name: str, file: bytes) -> object:
            if not name.endswith((".csv", ".parquet")):
                return file
            table = (pd.read_csv if name.endswith(".csv") else pd.read_parquet)(io.BytesIO(file))
            if "metric" not in table:
                return file
            return table[~table["metric"].str.endswith("_seconds")].to_csv(index=False)

        return {name: without_seconds(name, file) for name, file in files_in(out, "summary/*").items()}

    continued(compare, tmp_path, 1, content)


def test_run(random_organism: Path, tmp_path: Path) -> None:
    parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(NOTEBOOK)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "books").mkdir()
    nbformat.write(book, tmp_path / "books" / "01_reads.ipynb")
    settings = settings_of(model=str(random_organism), profile="smoke")

    def run(out: Path) -> Callable[[], None]:
        return lambda: run_study(settings, out, notebooks_folder=tmp_path / "books", jobs=1) and None

    def content(out: Path) -> dict[str, object]:
        files = files_in(out, "figures/*.csv", "tables/*")
        assert json.loads((out / "manifest.json").read_text())["outputs"].keys() == files.keys()
        return files

    continued(run, tmp_path, 1, content)
