"""What a person reads: lines and aligned tables, without what there is not; JSON that every reader takes."""

import json
from pathlib import Path

import pytest
from helpers.command import run

from casa_mech.cli.printing import as_text, show, table
from casa_mech.cli.study import _readable


def test_missing_values_are_left_out_and_records_are_tables() -> None:
    rows = [{"name": "none", "rate": 0.12345, "gate": None}, {"name": "casa", "rate": float("nan"), "seconds": 2}]
    text = as_text({"model": "m", "gate": None, "prefill": "", "files": [], "seeds": [0, 1], "rows": rows})
    assert text.splitlines() == [
        "model: m",
        "seeds: 0, 1",
        "rows:",
        "  name  rate    seconds",
        "  none  0.1235  -",
        "  casa  -       2",
    ]


def test_records_in_records_are_indented() -> None:
    assert as_text({"a": {"b": {"c": 1}, "d": None}}).splitlines() == ["a:", "  b:", "    c: 1"]


def test_a_table_is_cut_to_the_width_and_each_part_begins_with_the_first_column() -> None:
    rows = [{"name": "casa", **{f"column {number}": "x" * 10 for number in range(6)}}]
    lines = table(rows, width=40).splitlines()
    assert max(map(len, lines)) <= 40 and sum(line.startswith("  casa") for line in lines) == 3
    assert all(f"column {number}" in "".join(lines) for number in range(6))


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    show({"rows": [{"v_s": float("nan"), "path": Path("a")}]}, as_json=True)
    printed = capsys.readouterr().out
    assert json.loads(printed, parse_constant=pytest.fail) == {"rows": [{"v_s": None, "path": "a"}]}


def test_every_ratio_of_a_benchmark_is_a_row_of_one_table() -> None:
    gate = {"gated_seconds": 0.2, "plain_seconds": 0.1, "ratio": 2.0, "allowed": 1.25}
    coca = {"defense": "coca", "surface": "image", "coca_seconds": 0.3, "plain_seconds": 0.1, "ratio": 3.0}
    probes = {"collect": {"store_seconds": 1.0, "bare_seconds": 1.0, "ratio": 1.0}, "memory": {"grown_mb": 0.1}}
    readable = _readable({"model": "m", "generation": gate, "defenses": {"ratios": [coca]}, "probes": probes})
    text = as_text(readable)
    assert [line.split() for line in text.splitlines() if " plain " in line or " bare " in line] == [
        ["generation", "gated", "0.2", "plain", "0.1", "2", "1.25"],
        ["defenses", "coca", "image", "coca", "0.3", "plain", "0.1", "3", "-"],
        ["collect", "store", "1", "bare", "1", "1", "-"],
    ]
    assert "grown_mb: 0.1" in text and "{" not in text


def test_compare_prints_tables_and_where_the_files_are(
    random_organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--defenses", "none,casa", "--attacks", "plain", "--n", "4", "--steps", "2", "--examples", "16"]
    arguments += ["--timing-rounds", "0", "--max-new-tokens", "2", "--out", tmp_path / "grid"]
    code, printed, err = run(capsys, "compare", "--model", random_organism, *arguments)
    assert code == 0, err
    assert not set("{}") & set(printed), "records are printed as tables"
    lines = printed.splitlines()
    heading = next(line for line in lines if line.startswith("  defense  attack success"))
    none, casa = lines[lines.index(heading) + 1 :][:2]
    assert none.split()[0] == "none" and casa.split()[0] == "casa"
    assert max(len(line) for line in lines if line.startswith("  ")) <= 120
    for name in (line for line in lines if line.startswith(("tables: ", "figures: "))):
        for file in name.partition(": ")[2].split(", "):
            assert (tmp_path / "grid" / file).is_file()


def test_bench_prints_no_records(random_organism: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, err = run(capsys, "bench", "--model", random_organism, "--repeats", "1")
    assert code == 0, err
    assert "{" not in printed and "measured" in printed and "training_step" in printed
