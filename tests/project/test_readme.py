"""The README's numbers are those of the committed figures, and each figure has its numbers beside it."""

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
import pytest
from helpers.paths import ROOT

FIGURES = ROOT / "figures"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GRID = {
    "none": "none",
    "safety prompt": "safety-prompt",
    "SSFT": "ssft",
    "SSFT with the token (CASA without attention)": "ssft-token",
    "refusal token": "refusal-token",
    "circuit breaker": "circuit-breaker",
    "CASA": "casa",
    "CASA + safety prompt": "casa + safety prompt",
    "CoCA (α = 4)": "coca",
    "SafeCoDe (paper mode)": "safecode",
    "MoRAS": "moras",
}


def _rows(text: str) -> list[list[str]]:
    """The cells of the tables' rows in `text`, without their rules."""
    lines = [line.strip("|").replace("**", "") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines if not set(line) <= set("|-")]


def _section(first: str, last: str) -> list[list[str]]:
    return _rows(README.split(first, 1)[1].split(last, 1)[0])


def _percent(row: Mapping[Hashable, Any]) -> str:
    low, high = max(0.0, row["low"]), min(1.0, row["high"])
    return f"{100 * row['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_each_figure_has_its_numbers_and_a_vector_form() -> None:
    pictures = sorted(FIGURES.rglob("*.png"))
    assert pictures
    for picture in pictures:
        for suffix in (".csv", ".svg"):
            assert picture.with_suffix(suffix).stat().st_size > 0, picture


@pytest.mark.parametrize("model", ["organism", "organism-split"])
def test_the_grid_is_the_committed_one(model: str) -> None:
    head, *rows = _section("### The peers", "### Real English")
    start = next(place for place, row in enumerate(rows, start=1) if row[0] == f"`{model}`")
    summary = pd.read_csv(FIGURES / "grid" / f"compare-{model}-summary.csv")
    assert set(summary["seeds"]) == {3}
    known = {(row["defense"], row["metric"], row["scope"]): row for row in summary.to_dict("records")}
    for row in rows[start : start + len(GRID)]:
        found = dict(zip(head, row, strict=True))
        defense = GRID[found["defence"]]
        assert found["mean"] == _percent(known[defense, "attack_success", "all"]), defense
        assert found["answered"] == _percent(known[defense, "benign_answered", "all"]), defense
        for attack in head[1:9]:
            assert found[attack] == f"{100 * known[defense, 'attack_success', attack]['value']:.0f}", (defense, attack)


def test_the_token_alone_is_behind_in_no_trained_pair() -> None:
    ahead: list[float] = []
    for model in ("organism", "organism-split"):
        rates = pd.read_csv(FIGURES / "grid" / f"compare-{model}-results.csv").query("metric == 'attack_success'")
        mean = rates.groupby(["defense", "seed"])["value"].mean()
        ahead += list(100 * (mean["casa"] - mean["ssft-token"]))
    assert len(ahead) == 6 and min(ahead) >= 0
    assert f"by {min(ahead):.1f} to {max(ahead):.1f} points" in README.replace("\n  ", " ")


def test_the_attack_table_is_the_committed_one() -> None:
    rates = {_percent(row) for row in pd.read_csv(FIGURES / "attack_success.csv").to_dict("records")}
    rows = [row for row in _section("made by\n`make study`", "What to take from it") if len(row) == 6]
    cells = [cell for row in rows for cell in row[1:3] if "[" in cell]
    assert len(cells) == 24 and set(cells) <= rates


def test_the_table_on_real_english_is_the_committed_one() -> None:
    numbers = pd.read_csv(FIGURES / "english" / "english_gate.csv")
    chosen = numbers[numbers["metric"].isin(["gate_auroc", "token_auroc", "words_auroc"])].to_dict("records")
    known = {f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in chosen}
    _, *rows = _section("### Real English", "## The command line")
    cells = [cell for row in rows for cell in row[3:6] if cell != "–"]
    assert len(cells) == 15 and set(cells) <= known
