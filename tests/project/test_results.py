"""docs/results.md is what the committed figures' numbers make, cell by cell; each figure has its numbers beside it."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from helpers.paths import GALLERY, ROOT

PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
TEMPLATE = (ROOT / "docs" / "results.template.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_results"] = module
    spec.loader.exec_module(module)
    return module


def _table(first: str) -> pd.DataFrame:
    """The page's table whose heading row begins with `first`."""
    lines = PAGE.split(f"\n| {first} |", 1)[1].split("\n\n")[0].splitlines()
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in [f"{first} |{lines[0]}", *lines[1:]]
    ]
    return pd.DataFrame(rows, columns=head)


def _cell(row: pd.Series) -> str:
    low, high = max(0.0, row["low"]), min(1.0, row["high"])
    return f"{100 * row['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_each_figure_has_its_numbers_and_a_vector_form() -> None:
    pictures = sorted(GALLERY.rglob("*.png"))
    assert pictures
    for picture in pictures:
        for suffix in (".csv", ".svg"):
            assert picture.with_suffix(suffix).stat().st_size > 0, picture


def test_the_page_is_the_one_that_the_figures_make(maker: ModuleType) -> None:
    assert maker.results_page(TEMPLATE, maker.places()) == PAGE, "run `make results`"
    unused = {name for name in maker.places() if f"{{{{{name}}}}}" not in TEMPLATE}
    assert not unused, f"made and not shown: {unused}"


def test_success_by_attack_stands_in_its_row_and_column() -> None:
    table = _table("model").set_index(["model", "attack"])
    rates = pd.read_csv(GALLERY / "attack_success.csv").set_index(["model", "defense", "attack", "metric"])
    columns = {
        "success, pretrained": ("pretrained", "attack_success"),
        "success, CASA": ("CASA", "attack_success"),
        "harmful refused, CASA": ("CASA", "refused"),
        "benign answered, pretrained": ("pretrained", "benign_answered"),
        "benign answered, CASA": ("CASA", "benign_answered"),
    }
    assert len(table) == 12
    for (model, attack), row in table.iterrows():
        for column, (defense, metric) in columns.items():
            assert row[column] == _cell(rates.loc[model.strip("`"), defense, attack, metric]), (model, attack, column)


@pytest.mark.parametrize(
    ("path", "rows", "column", "table", "arguments"),
    [
        ("attack_success.csv", "attack in ('plain', 'audio')", "value", "attack_table", ()),
        ("attack_success.csv", "model == 'organism' and attack == 'prefill-9'", "low", "prefill_table", ()),
        ("attack_benchmarks.csv", "metric == 'attack_success'", "high", "benchmark_table", ()),
        ("gate_and_token.csv", "metric == 'gate_auroc'", "value", "attack_table", ()),
        (
            "grid/compare-organism-summary.csv",
            "metric == 'attack_success' and scope == 'image'", "value", "grid_table", ("organism",),
        ),
        (
            "grid/compare-organism-split-summary.csv",
            "metric == 'benign_answered' and scope == 'all'", "value", "grid_table", ("organism-split",),
        ),
        ("token_audit.csv", "measure == 'refused' and name == 'do(unsafe)'", "value", "audit_table", ()),
    ],
)  # fmt: skip
def test_two_numbers_that_change_places_show(
    maker: ModuleType, tmp_path: Path, path: str, rows: str, column: str, table: str, arguments: tuple[str, ...]
) -> None:
    figures = tmp_path / "figures"
    shutil.copytree(GALLERY, figures, ignore=shutil.ignore_patterns("*.png", "*.svg", "smoke"))
    numbers = pd.read_csv(figures / path)
    one, *_, other = numbers.query(rows).drop_duplicates(column).index
    numbers.loc[[one, other], column] = numbers.loc[[other, one], column].to_numpy()
    numbers.to_csv(figures / path, index=False)
    make = getattr(maker, table)
    assert make(GALLERY, *arguments) in PAGE
    assert make(figures, *arguments) not in PAGE
