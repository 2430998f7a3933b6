"""The index of queries on disk: what goes in comes out, whole or not at all, and a stopped writing continues."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import soundfile
from PIL import Image

from casa_mech.errors import InputError, RunError
from casa_mech.queries import AudioPart, ImagePart, Query, TextPart, Turn
from casa_mech.queries import index as module
from casa_mech.queries.index import INDEX, is_index, read_index, write_index
from casa_mech.queries.media import load_audio, load_image


def content(query: Query) -> list:
    """All that a query holds, pictures as pixels and clips as samples."""

    def of(parts) -> list:
        return [
            part.text
            if part.kind == "text"
            else np.asarray(load_image(part, "x")).tolist()
            if part.kind == "image"
            else load_audio(part, "x").tolist()
            for part in parts
        ]

    turns = [(turn.role, turn.safety_token, of(turn.parts)) for turn in query.history]
    fields = [query.id, query.label, query.source, query.system, query.prefill, dict(query.meta)]
    return [*fields, of(query.parts), turns]


@pytest.fixture
def queries(tmp_path: Path) -> list[Query]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (28, 56, 3), dtype=np.uint8)
    clip = (0.1 * rng.standard_normal(6000)).astype(np.float32)
    Image.fromarray(pixels).save(tmp_path / "a picture.JPG")
    soundfile.write(tmp_path / "stereo.wav", np.stack([clip, clip], axis=1), 48_000)
    text = TextPart(text="was heißt „das“?\nzwei Zeilen")
    history = (
        Turn(role="user", parts=(ImagePart(image=pixels), text)),
        Turn(role="assistant", parts=(TextPart(text="ok"),), safety_token="safe"),
    )
    return [
        Query.from_text("plain", id="a", label="harmful", system="", prefill="sure ,", meta={"topic": "x", "n": "1"}),
        Query(id="b/1", parts=(ImagePart(image=Image.fromarray(pixels)), text), label="benign", history=history),
        Query(id="c", parts=(AudioPart(audio=clip, rate=16_000), text), source="s", system="be kind"),
        Query(id="d", parts=(AudioPart(audio=(clip * 30_000).astype(np.int16), rate=44_100), ImagePart(image=pixels))),
        Query(id="e", parts=(ImagePart(image=tmp_path / "a picture.JPG"), AudioPart(audio=tmp_path / "stereo.wav"))),
        Query(id="f", parts=(ImagePart(image=rng.random((30, 30, 3))), ImagePart(image=Image.new("RGBA", (9, 9))))),
    ]


def test_what_is_written_is_read_back_equal(tmp_path: Path, queries: list[Query]) -> None:
    out = tmp_path / "out"
    assert write_index(out, queries) == 6
    back = read_index(out)
    assert list(map(content, back)) == list(map(content, queries))
    assert is_index(out) and not is_index(tmp_path)
    assert {part.kind for query in back for part in query.parts} == {"text", "image", "audio"}
    assert {entry.name for entry in out.iterdir()} == {INDEX, "media", ".lock"}
    stored = json.loads(parquet.read_table(out / INDEX).to_pylist()[2]["parts"])
    assert stored[0]["path"].startswith("media/") and stored[0]["path"].endswith(".wav")
    moved = shutil.move(out, tmp_path / "elsewhere")
    assert list(map(content, read_index(moved))) == list(map(content, queries))


def test_the_same_call_writes_nothing_anew_and_another_is_refused(tmp_path: Path, queries: list[Query]) -> None:
    out = tmp_path / "out"
    write_index(out, queries, key="k")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert write_index(out, queries, key="k") == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    for other in (lambda: write_index(out, queries, key="l"), lambda: write_index(out, queries[:2], key="k")):
        with pytest.raises(RunError, match="holds an index of other queries or options: choose a new or empty --out"):
            other()
    again = tmp_path / "again"
    write_index(again, queries, key="k")
    files = sorted(path.relative_to(out) for path in before)
    assert [(out / path).read_bytes() for path in files] == [(again / path).read_bytes() for path in files]


def test_a_stopped_writing_is_no_index_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queries: list[Query]
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    out, seen = tmp_path / "out", []

    def make(query: Query) -> Query:
        seen.append(query.id)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return query.model_copy(update={"meta": {"attack": "x"}})

    with pytest.raises(KeyboardInterrupt):
        write_index(out, queries, make)
    with pytest.raises(InputError, match="its writing was stopped: give the same command again"):
        read_index(out)
    (out / "media" / "orphan.png").write_bytes(b"left by an earlier try")
    assert write_index(out, queries, make) == 4
    assert seen == ["a", "b/1", "c", "d", "c", "d", "e", "f"]
    assert [query.id for query in read_index(out)] == [query.id for query in queries]
    assert {query.meta["attack"] for query in read_index(out)} == {"x"}
    assert not (out / "media" / "orphan.png").exists() and not (out / "parts").exists()


def test_queries_can_be_left_out(tmp_path: Path, queries: list[Query]) -> None:
    write_index(tmp_path / "out", queries, lambda query: query if query.id in "ac" else None)
    assert [query.id for query in read_index(tmp_path / "out")] == ["a", "c"]
    with pytest.raises(InputError, match="none of the queries was kept"):
        write_index(tmp_path / "none", queries, lambda query: None)
    assert not is_index(tmp_path / "none")


def test_a_missing_file_or_a_clip_of_zero_length_names_the_query(tmp_path: Path) -> None:
    empty = Query(id="q7", parts=(AudioPart(audio=np.zeros(0, dtype=np.float32), rate=16_000),))
    with pytest.raises(InputError, match="query 'q7': its clip has zero length"):
        write_index(tmp_path / "out", [empty])
    gone = Query(id="q8", parts=(ImagePart(image=tmp_path / "gone.png"),))
    with pytest.raises(InputError, match=r"query 'q8': no file .*gone.png"):
        write_index(tmp_path / "out", [gone])
    with pytest.raises(InputError, match="two queries have the id 'a'"):
        write_index(tmp_path / "out", [Query.from_text("x", id="a")] * 2)
    with pytest.raises(InputError, match="no queries to write"):
        write_index(tmp_path / "out", [])
    assert not list(tmp_path.rglob("*.part*"))


def test_another_folder_is_left_alone(tmp_path: Path, queries: list[Query]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"holds other files \(.*choose a new or empty --out"):
        write_index(tmp_path, queries)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def _rewrite(out: Path, **change: str) -> None:
    table = parquet.read_table(out / INDEX)
    rows = [row | change for row in table.to_pylist()]
    parquet.write_table(type(table).from_pylist(rows, schema=table.schema), out / INDEX)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / INDEX).write_bytes(b"PAR1"), "not a readable index"),
        (
            lambda out: next((out / "media").glob("*.png")).unlink(),
            r"query 'b/1': no file .*\.png; copy the folder again",
        ),
        (lambda out: _rewrite(out, parts="{"), "query 'a': not a query"),
        (lambda out: _rewrite(out, label="evil"), "query 'a': not a query"),
        (lambda out: _rewrite(out, parts='[{"kind": "image", "path": "../x.png"}]'), "lies outside the folder"),
        (
            lambda out: parquet.write_table(parquet.read_table(out / INDEX).drop(["meta"]), out / INDEX),
            "no column 'meta'",
        ),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, queries: list[Query], damage, message: str) -> None:
    write_index(tmp_path / "out", queries[:2])
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=message) as caught:
        read_index(tmp_path / "out")
    assert "\n" not in str(caught.value)
