"""Tables, indexes and their cells that are broken, hostile or too long are refused by one line that names the place."""

import json
import os
import random
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from casa_mech.errors import InputError
from casa_mech.limits import CHARACTERS
from casa_mech.queries import Query, TextPart
from casa_mech.queries.files import QuerySource, read_examples, read_files, with_columns
from casa_mech.queries.index import INDEX, read_index, write_index
from casa_mech.queries.query import ImagePart
from casa_mech.queries.tables import defused, read_json, undefused


def refused(path: Path, **fields: object) -> str:
    """The line by which reading the table is refused."""
    with pytest.raises(InputError) as caught:
        read_files(QuerySource(path=path, **fields))
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet", "txt"])
def test_a_cell_of_ten_megabytes_is_refused_at_once_by_its_row(tmp_path: Path, suffix: str) -> None:
    path, texts = tmp_path / f"t.{suffix}", ["bake a cake", "1 " * 5_000_000]
    table = pd.DataFrame({"prompt": texts})
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "txt":
        path.write_text("\n".join(texts))
    else:
        table.to_json(path, orient="records", lines=suffix == "jsonl")
    began = time.monotonic()
    message = refused(path)
    assert time.monotonic() - began < 5
    place = "line 2" if suffix == "txt" else "row 2"
    assert place in message and "and 200,000 are read" in message and CHARACTERS.variable in message


def test_the_limit_on_text_is_for_moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_text("prompt\nbake a cake\n")
    monkeypatch.setenv("CASA_MECH_MAX_CHARACTERS", "10")
    assert "a text of 11 characters, and 10 are read" in refused(tmp_path / "t.csv")
    monkeypatch.setenv("CASA_MECH_MAX_CHARACTERS", "11")
    assert len(read_files(QuerySource(path=tmp_path / "t.csv"))) == 1


@pytest.mark.parametrize("value", [["a", "b"], {"a": "b"}, b"bytes", [], [["a"]]])
def test_cells_that_hold_no_text_are_refused_by_row(tmp_path: Path, value: object) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"prompt": [value, value]}).to_parquet(path)
    assert "row 1: a cell holds" in refused(path) and "not text" in refused(path)
    if not isinstance(value, bytes):
        (tmp_path / "t.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": value}]))
        assert "row 2: a cell holds" in refused(tmp_path / "t.json")
        meta = [{"prompt": "a", "topic": value, "reply": "no", "label": "harmful"}]
        (tmp_path / "m.json").write_text(json.dumps(meta))
        queries = read_files(QuerySource(path=tmp_path / "m.json"))
        with pytest.raises(InputError, match=r"m\.json:1: a cell holds"):
            with_columns(queries, tmp_path / "m.json", {"topic": "topic"})
        with pytest.raises(InputError, match=r"m.json row 1, column 'topic': a cell holds"):
            read_examples(tmp_path / "m.json", "prompt", "topic", "label")


def test_missing_values_of_every_kind_are_empty_cells(tmp_path: Path) -> None:
    for number, kind in enumerate(("object", "string", "Int64", "float64")):
        path = tmp_path / f"{number}.parquet"
        pd.DataFrame({"prompt": ["a", "b"], "text": pd.array([None, None], dtype=kind)}).to_parquet(path)
        assert "row 1: empty prompt" in refused(path, column="text")


def test_json_that_is_nested_deep_is_refused(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for name, content, place in (
        ("t.json", deep, "nested too deep"),
        ("t.jsonl", f"{{}}\n\n{deep}\n", "line 3: nested"),
    ):
        (tmp_path / name).write_text(content)
        assert place in refused(tmp_path / name)


def test_a_broken_line_is_counted_as_an_editor_counts_it(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a"}\n\n\n{"prompt": b}\n')
    with pytest.raises(InputError, match=r"t.jsonl table \(line 4 column 12: Expecting value\)|line 4 column 12"):
        read_json(path)


def test_numbers_of_many_digits_are_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"prompt": ' + "1" * 10_000 + "}]")
    if sys.get_int_max_str_digits():
        assert "not a readable json table" in refused(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["a.csv", "a.png", "a.wav", "a.txt", "a"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is a pipe or device" in refused(tmp_path / name)


def test_names_and_texts_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = Path(os.fsdecode(os.fsencode(str(folder)) + b"/\xff.png"))
    Image.new("RGB", (28, 28)).save(picture)
    assert "not UTF-8" in refused(folder)
    (tmp_path / "t.json").write_text('[{"prompt": "a \\ud800 b"}]')
    assert "surrogates not allowed" in refused(tmp_path / "t.json")


def test_an_index_does_not_follow_a_link_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    query = Query(id="q1", parts=(ImagePart(image=Image.new("RGB", (28, 28))), TextPart(text="look")))
    write_index(tmp_path / "index", [query])
    (medium,) = (tmp_path / "index" / "media").iterdir()
    medium.unlink()
    medium.symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"query 'q1': its file .* lies outside the folder"):
        read_index(tmp_path / "index")
    medium.unlink()
    Image.new("RGB", (28, 28)).save(tmp_path / "index" / "other.png")
    medium.symlink_to(tmp_path / "index" / "other.png")
    assert read_index(tmp_path / "index")[0].modalities == {"image", "text"}


def test_an_index_with_rows_that_are_no_queries_is_refused(tmp_path: Path) -> None:
    for column, value in (("parts", "[" * 100_000), ("parts", "3"), ("meta", '{"a": {}}'), ("label", "x")):
        write_index(tmp_path / column, [Query.from_text("a", id="q1")])
        table = pd.read_parquet(tmp_path / column / INDEX)
        table[column] = value
        table.to_parquet(tmp_path / column / INDEX)
        with pytest.raises(InputError, match=f"{INDEX}, query 'q1'") as caught:
            read_index(tmp_path / column)
        assert "\n" not in str(caught.value)
        (tmp_path / column / INDEX).unlink()


def test_formulas_are_told_from_texts_and_come_back_as_they_were() -> None:
    texts = ["=cmd|' /C calc'!A0", "+1", "-1", "@sum", "\ttab", "'=quoted", "''-", "'plain", "plain", "", None]
    table = defused(pd.DataFrame({"reply": texts, "v_s": [-0.5] * len(texts)}))
    cells = table["reply"].tolist()[:-1]
    assert not any(cell[:1] in "=+-@\t" for cell in cells if cell)
    assert [undefused(cell) for cell in cells] == texts[:-1] and pd.isna(table["reply"].iloc[-1])
    assert table["v_s"].tolist() == [-0.5] * len(texts)


def test_parquet_files_changed_anywhere_are_read_or_refused_by_one_line(tmp_path: Path) -> None:
    rows = {"prompt": ["bake a cake", "make a bomb"], "label": ["benign", "harmful"]}
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    write_index(tmp_path / "index", [Query.from_text("a", id="q1"), Query.from_text("b", id="q2")])
    rng = random.Random(0)
    for path in (tmp_path / "t.parquet", tmp_path / "index" / INDEX):
        whole = path.read_bytes()
        for _ in range(400):
            content = bytearray(whole)
            for _ in range(rng.choice([1, 2, 8])):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(bytes(content))
            try:
                read_files(QuerySource(path=path.parent if path.name == INDEX else path))
            except InputError as error:
                assert "\n" not in str(error) and path.name in str(error)


def test_line_breaks_in_a_file_do_not_break_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('"a\nb",c\n1,2\n')
    assert "it has a b, c" in refused(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["9" * 5_000 + ".png", "a\0.png", "../" * 3_000 + "a.png"])
def test_names_that_no_file_can_have_are_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.json").write_text(json.dumps([{"picture": name}]))
    assert "row 1: no file" in refused(tmp_path / "t.json", image_column="picture")
