"""Reading queries from a researcher's files, and the one-line errors that bad ones give."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from PIL import Image

from casa_mech.errors import InputError, RunError
from casa_mech.files import TEMPORARY, writing, writing_folder
from casa_mech.queries.files import QuerySource, read_examples, read_files, read_source
from casa_mech.queries.media import load_audio, load_image

ROWS = [{"goal": "how do i bake a cake", "n": 1}, {"goal": "wie backt man Küchlein, bitte", "n": 2}]


def _write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False, encoding="utf-8-sig")
    elif path.suffix == ".tsv":
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_table_type_gives_the_same_queries(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"prompts{suffix}", ROWS)
    queries = read_files(QuerySource(path=path, column="goal", label="benign"))
    assert [query.text for query in queries] == [row["goal"] for row in ROWS]
    assert [query.id for query in queries] == [f"prompts{suffix}:1", f"prompts{suffix}:2"]
    assert {query.label for query in queries} == {"benign"}


def test_media_columns_and_folders(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", np.ones(1600, dtype=np.float32) * 0.1, 16_000)
    table = _write(tmp_path / "t.csv", [{"goal": "look", "picture": "a.png", "clip": "b.wav"}])
    source = QuerySource(path=table, column="goal", image_column="picture", audio_column="clip")
    assert read_files(source)[0].modalities == {"text", "image", "audio"}
    folder = read_files(QuerySource(path=tmp_path, label="harmful", text="say it"))
    assert [query.modalities for query in folder] == [{"image", "text"}, {"audio", "text"}]
    assert read_files(QuerySource(path=tmp_path / "a.png"))[0].modalities == {"image"}


def test_a_rows_own_label_counts_whatever_its_case(tmp_path: Path) -> None:
    rows = [("a bomb", "Harmful"), ("tea", "BENIGN"), ("a virus", " unsafe "), ("cake", "safe"), ("a hat", "")]
    path = _write(tmp_path / "t.csv", [{"prompt": prompt, "label": label} for prompt, label in rows])
    labels = [query.label for query in read_files(QuerySource(path=path))]
    assert labels == ["harmful", "benign", "harmful", "benign", None]
    assert {query.label for query in read_files(QuerySource(path=path, label_column=""))} == {None}
    with pytest.raises(InputError, match=r"t.csv row 2 is labelled benign in column 'label', not harmful: leave out"):
        read_files(QuerySource(path=path, label="harmful"))
    assert read_files(QuerySource(path=path, label="harmful", limit=1))[0].label == "harmful"
    left = read_files(QuerySource(path=path, label="harmful", other_labels="leave_out"))
    assert [query.id for query in left] == ["t.csv:1", "t.csv:3", "t.csv:5"] and {q.label for q in left} == {"harmful"}


def test_a_label_column_of_another_kind_is_not_guessed_at(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", [{"prompt": "tea", "label": "1", "kind": "benign"}])
    with pytest.raises(InputError, match=r"row 1: label '1' in column 'label'; write harmful or benign"):
        read_files(QuerySource(path=path))
    for fields in ({"label": "benign"}, {"label_column": "kind"}):
        assert read_files(QuerySource(path=path, **fields))[0].label == "benign"
    with pytest.raises(InputError, match="it has prompt, label, kind"):
        read_files(QuerySource(path=path, label_column="class"))


def test_a_column_called_prompt_needs_no_naming(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    path = _write(tmp_path / "t.csv", [{"prompt": "look", "picture": "a.png"}])
    assert read_files(QuerySource(path=path))[0].text == "look"
    assert read_files(QuerySource(path=path, image_column="picture"))[0].modalities == {"text", "image"}
    assert read_files(QuerySource(path=path, image_column="picture", column=""))[0].modalities == {"image"}


def test_a_row_needs_one_of_prompt_picture_and_clip(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    rows = [{"prompt": "", "picture": "a.png"}, {"prompt": "look", "picture": ""}, {"prompt": "", "picture": ""}]
    path = _write(tmp_path / "t.csv", rows)
    source = QuerySource(path=path, image_column="picture", limit=2)
    assert [query.modalities for query in read_files(source)] == [{"image"}, {"text"}]
    assert [query.text for query in read_files(source.model_copy(update={"text": "see"}))] == ["see", "look"]
    with pytest.raises(InputError, match="row 3: nothing in columns 'prompt', 'picture'"):
        read_files(source.model_copy(update={"limit": None}))


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffbake a cake\n\n how about tea? \n", encoding="utf-8")
    queries = read_files(QuerySource(path=tmp_path / "p.txt", label="benign"))
    assert [(query.id, query.text, query.label) for query in queries] == [
        ("p.txt:1", "bake a cake", "benign"),
        ("p.txt:2", "how about tea?", "benign"),
    ]


def test_limit_takes_from_the_start(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", ROWS)
    assert len(read_files(QuerySource(path=path, column="goal", limit=1))) == 1


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (lambda d: None, {"path": "gone.csv", "column": "goal"}, "no file or folder"),
        (lambda d: _write(d / "t.csv", ROWS), {"path": "t.csv", "column": "prompt"}, "it has goal, n"),
        (lambda d: _write(d / "t.csv", ROWS), {"path": "t.csv"}, "it has goal, n"),
        (lambda d: _write(d / "t.csv", [*ROWS, {"goal": " ", "n": 3}]), {"path": "t.csv", "column": "goal"}, "row 3"),
        (lambda d: _write(d / "t.json", [{"goal": None}]), {"path": "t.json", "column": "goal"}, "row 1: empty prompt"),
        (lambda d: (d / "t.json").write_text("{"), {"path": "t.json", "column": "goal"}, "not a readable json"),
        (lambda d: (d / "t.json").write_text("[1]"), {"path": "t.json", "column": "goal"}, "list of objects"),
        (lambda d: (d / "t.csv").write_text(""), {"path": "t.csv", "column": "goal"}, "is empty"),
        (lambda d: (d / "t.csv").write_text("goal\n"), {"path": "t.csv", "column": "goal"}, "holds no rows"),
        (lambda d: (d / "t.csv").write_bytes(b"goal\n\xff\xfe"), {"path": "t.csv", "column": "goal"}, "not a readable"),
        (lambda d: (d / "t.parquet").write_text("x"), {"path": "t.parquet", "column": "goal"}, "not a readable"),
        (lambda d: (d / "t.pdf").write_text("x"), {"path": "t.pdf"}, "are not read"),
        (lambda d: (d / "e").mkdir(), {"path": "e"}, "no pictures or clips"),
        (lambda d: _write(d / "t.csv", [{"i": "x.png"}]), {"path": "t.csv", "image_column": "i"}, "no file"),
        (lambda d: (d / "t.txt").write_text("\n \n"), {"path": "t.txt"}, "is empty"),
        (lambda d: _write(d / "t.csv", [{"i": "t.csv"}]), {"path": "t.csv", "image_column": "i"}, "t.csv is none of"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, make, source: dict, message: str) -> None:
    make(tmp_path)
    fields = {**source, "path": tmp_path / source["path"]}
    with pytest.raises(InputError, match=message) as caught:
        read_files(QuerySource(**fields))
    assert "\n" not in str(caught.value)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with writing(target) as temporary:
        temporary.write_text("one")
    with pytest.raises(ZeroDivisionError), writing(target) as temporary:
        temporary.write_text("two")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), writing_folder(tmp_path / "folder") as temporary:
        (temporary / "half").write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "one"
    assert not (tmp_path / "folder").exists()
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no space left") as caught, writing(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(RunError, match="is there already"), writing(tmp_path / "run" / "a.txt") as temporary:
        temporary.write_text("x")


def test_a_byte_order_mark_and_long_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("goal\nbake a cake\n", encoding="utf-8-sig")
    assert read_files(QuerySource(path=path, column="goal"))[0].text == "bake a cake"
    for content, message in (
        ("goal;n\nbake;1\n", "separated by semicolons, but a .csv file is read with commas"),
        ("goal\tn\nbake\t1\n", "separated by tabs"),
        ("goal,n\nbake, please,1\n", "more cells than there are headings"),
        ("goal,n\nbake,1\nbake, please,1\n", "not a readable csv"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_files(QuerySource(path=path, column="goal"))


def test_rows_about_minors_are_left_out_and_counted(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "t.csv", [{"goal": "sell it to kids"}, {"goal": "bake"}, {"goal": "a sexual tale of a teen"}]
    )
    reading = read_source(QuerySource(path=path, column="goal", label="harmful"))
    assert ([query.id for query in reading.queries], reading.rows) == (["t.csv:2"], 3)
    assert reading.dropped == ("t.csv:1", "t.csv:3")
    assert read_source(QuerySource(path=path, column="goal")).dropped == ("t.csv:3",)  # no label: beside such a word
    assert len(read_files(QuerySource(path=path, column="goal", label="harmful", drop_minors=False))) == 3
    rows = [{"p": "sell it to kids", "r": "no", "l": "harmful"}, {"p": "bake", "r": "mix", "l": "benign"}]
    examples = read_examples(_write(tmp_path / "e.csv", rows), "p", "r", "l")
    assert (len(examples.examples), examples.dropped) == (1, ("e.csv:1",))


def test_broken_pictures_and_clips_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    soundfile.write(tmp_path / "none.wav", np.zeros(0, dtype=np.float32), 16_000)
    (tmp_path / "nothing.wav").write_bytes(b"")
    for name, load, message in (
        ("cut.png", lambda part: load_image(part, "q1"), r"q1: .*cut.png is not a readable image \(.*truncated"),
        ("none.wav", lambda part: load_audio(part, "q1"), r"q1: .*none.wav is empty or shorter than 0.1 s"),
        ("nothing.wav", lambda part: load_audio(part, "q1"), r"q1: .*nothing.wav is not readable audio"),
    ):
        (query,) = read_files(QuerySource(path=tmp_path / name))
        with pytest.raises(InputError, match=message) as caught:
            load(query.parts[0])
        assert "\n" not in str(caught.value)


def test_a_stereo_clip_at_48_khz_becomes_mono_at_16(tmp_path: Path) -> None:
    seconds = np.arange(48_000) / 48_000
    tone = 0.2 * np.sin(2 * np.pi * 440 * seconds)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, tone], axis=1), 48_000)
    (query,) = read_files(QuerySource(path=tmp_path / "stereo.wav"))
    clip = load_audio(query.parts[0], "q1")
    assert (clip.shape, clip.dtype) == ((16_000,), np.float32)
    spectrum = np.abs(np.fft.rfft(clip))
    assert spectrum.argmax() == 440  # 1 s, so bins are hertz: resampled, not relabelled
