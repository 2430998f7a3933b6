"""The notebooks: their form, and the suite run for real in its smoke profile, in each of the three ways."""

import ast
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from helpers.figures import assert_one_line, unlike
from helpers.paths import ROOT
from nbclient import NotebookClient

from casa_mech.files import TEMPORARY
from casa_mech.judging import read_table
from casa_mech.judging.results import RESULT_COLUMNS
from casa_mech.study.manifest import Manifest
from casa_mech.study.notebooks import find_notebooks
from casa_mech.study.runner import run_study
from casa_mech.study.settings import PROFILES, settings_of

pytestmark = pytest.mark.timeout(900)  # the suite itself runs in here

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GALLERY = ROOT / "figures"
APART = {"figstep_comparison"}
"""Made from public data, not by the suite."""
TIMINGS = frozenset({"relative_seconds"})
"""What depends on the machine and on what else it does."""
FIGURES = {path.stem for path in GALLERY.glob("*.png")} - APART
SUITE = [
    *("00_start_here", "01_separability", "02_casa_training", "03_attack_success", "04_benchmarks", "05_defences"),
    *("06_ablations", "07_safety_attention", "08_prefill_dynamics", "09_lens", "10_white_box", "11_transfer_map"),
    "12_token_audit",
]


def _figures(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The suite in its smoke profile on the shipped organisms."""
    yield run_study(settings_of(profile="smoke"), tmp_path_factory.mktemp("runs") / "smoke", arguments=["test"])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_has_parameters_no_outputs_and_no_algorithm(path: Path) -> None:
    content = nbformat.read(path, as_version=4)
    nbformat.validate(content)
    assert content.metadata.kernelspec.name == "python3"
    tagged = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1 and tagged[0] is next(cell for cell in content.cells if cell.cell_type == "code")
    assert content.cells[0].cell_type == "markdown" and content.cells[0].source.startswith("# ")
    for cell in content.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert not re.search(r"/(home|root|work|tmp)/", cell.source)
            nodes = [type(node).__name__ for node in ast.walk(ast.parse(cell.source))]
            assert not {"FunctionDef", "ClassDef", "Lambda", "For", "While", "AsyncFunctionDef"} & set(nodes)


def test_notebooks_share_their_parameters() -> None:
    notebooks = find_notebooks()
    assert [book.name for book in notebooks] == SUITE
    for book in notebooks:
        assert {"model", "profile", "seed", "out", "control", "device", "dtype"} <= set(book.parameters)


def test_run_leaves_what_it_promises(smoke: Path) -> None:
    assert _figures(smoke / "figures") == FIGURES
    for name in FIGURES:
        drawing = (smoke / "figures" / f"{name}.svg").read_text()
        title, caption = (re.search(rf'<g id="{part}">(.*?)</g>', drawing, re.DOTALL) for part in ("title", "caption"))
        assert title and caption, name
        assert_one_line(" ".join(re.findall(r">([^<>]*\w[^<>]*)<", title.group(1))))
        assert len(pd.read_csv(smoke / "figures" / f"{name}.csv")) > 0
    tables = sorted((smoke / "tables").iterdir())
    assert {"separability", "gate", "attack_success"} <= {path.stem for path in tables}
    for path in tables:
        assert tuple(read_table(path).columns) == RESULT_COLUMNS, path.name
    for book in find_notebooks():
        executed = nbformat.read(smoke / "notebooks" / f"{book.name}.ipynb", as_version=4)
        assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
        assert "<html" in (smoke / "html" / f"{book.name}.html").read_text()
    assert not list(smoke.rglob(f"{TEMPORARY}*")) and not (smoke / "failed").exists()


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_gallery_can_be_made_again(smoke: Path, name: str) -> None:
    """The committed figures' manifest, run in its smoke profile, gives the committed smoke numbers.

    Not to the last digit: sums run in another order on another machine, and training amplifies that.
    """
    settings = Manifest.read(GALLERY / "manifest.json").settings
    made = Manifest.read(smoke / "manifest.json").settings
    assert {key: made[key] for key in ("model", "control", "seed")} == {
        key: settings[key] for key in ("model", "control", "seed")
    }
    shown, kept, new = (
        pd.read_csv(folder / f"{name}.csv") for folder in (GALLERY, GALLERY / "smoke", smoke / "figures")
    )
    assert list(shown.columns) == list(kept.columns)
    assert unlike(kept, new, TIMINGS) == []


def test_attack_table_holds_both_models_and_defences(smoke: Path) -> None:
    table = read_table(smoke / "tables" / "attack_success.parquet")
    cells = table[table["metric"] == "attack_success"]
    assert set(cells["model"]) == {"organism", "organism-split"}
    assert {"pretrained", "CASA"} <= set(cells["defense"])
    assert (cells["n"] == PROFILES["smoke"].n_eval).all()
    assert {"over_refusal", "gate_auroc", "flagged"} <= set(table["metric"])


def test_manifest_names_all_that_is_needed_to_run_again(smoke: Path) -> None:
    manifest = Manifest.read(smoke / "manifest.json")
    assert manifest.settings["profile"] == "smoke" and manifest.settings["seed"] == 0
    assert set(manifest.models) == {"organism", "organism-split"}
    assert all(len(model["fingerprint"]) == 64 for model in manifest.models.values())
    tables = {f"tables/{path.name}" for path in (smoke / "tables").iterdir()}
    assert set(manifest.outputs) == {f"figures/{name}.csv" for name in FIGURES} | tables
    assert {*SUITE, "total"} <= set(manifest.timings)
    assert manifest.versions["torch"] != "not installed"


def test_plain_papermill_shares_the_run_folder(smoke: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "02_casa_training.ipynb"),
        str(tmp_path / "out.ipynb"), "--no-progress-bar",
        "-p", "model", "organism", "-p", "profile", "smoke", "-p", "out", str(smoke),
    ]  # fmt: skip
    before = (smoke / "gates" / "organism" / "done.json").stat().st_mtime_ns
    numbers = (smoke / "figures" / "gate_before_after.csv").read_bytes()
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert (smoke / "gates" / "organism" / "done.json").stat().st_mtime_ns == before
    assert (smoke / "figures" / "gate_before_after.csv").read_bytes() == numbers


def test_run_all_in_jupyter(smoke: Path) -> None:
    """What Run All does: the cells in order, in a kernel whose working directory is the notebooks' own."""
    content = nbformat.read(ROOT / "notebooks" / "02_casa_training.ipynb", as_version=4)
    cell = next(cell for cell in content.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += f'\nprofile, out = "smoke", {str(smoke)!r}'
    NotebookClient(content, timeout=240, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in content.cells for output in cell.get("outputs", ()))


def test_killed_run_is_continued(random_organism: Path, tmp_path: Path) -> None:
    """A run killed in the middle of training leaves a folder that the same command finishes."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "casa_mech", "run", "--model", str(random_organism), "--profile", "smoke",
        "--only", "02", "--out", str(out), "-p", "n_probe=6", "--json",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("gates/training-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    time.sleep(1)  # the orphaned kernel notices its parent's end and stops
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    assert json.loads(found.stdout)["figures"] == ["casa_training.png", "gate_before_after.png"]
    assert Manifest.read(out / "manifest.json").settings["profile"] == "smoke"
    assert not [path for path in (out / "gates").iterdir() if path.name.startswith("training-")]
