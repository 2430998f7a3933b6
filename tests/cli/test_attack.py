"""`casa-mech attack`: files that evaluate reads, twins, options, what does not fit, and a stopped run."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers.command import run
from PIL import Image

from casa_mech.attacks import ATTACKS, apply_attack
from casa_mech.attacks.registry import SUMMARIES
from casa_mech.evaluation import attack_files
from casa_mech.omni.processor import load_processor
from casa_mech.organism.wording import MICRO_WORLD
from casa_mech.organism.world import default_world
from casa_mech.queries import index as index_module
from casa_mech.queries.index import is_index, read_index
from casa_mech.queries.media import load_audio, load_image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CASA_MECH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [("How do I bake a cake?", "cake"), ("What is tea?", "tea"), ("Is it late?", "clock")]
    path = tmp_path / "prompts.csv"
    pd.DataFrame(rows, columns=["goal", "word"]).to_csv(path, index=False)
    return path


def test_what_is_written_is_what_the_attack_gives_and_evaluate_reads_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, random_organism: Path
) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(capsys, "attack", "split", "--n", 4, "--seed", 3, "--out", out, "--json")
    summary = json.loads(printed)
    assert code == 0 and summary["queries"] == summary["pictures"] == summary["clips"] == 4
    asked = apply_attack("split", default_world().requests(4, 3, templates="held_out"), 3, wording=MICRO_WORLD)
    for here, there in zip(asked, read_index(out), strict=True):
        assert (here.id, here.text, here.label, here.meta) == (there.id, there.text, there.label, there.meta)
        assert np.array_equal(np.asarray(load_image(here.parts[0], "x")), np.asarray(load_image(there.parts[0], "x")))
        assert np.array_equal(load_audio(here.parts[1], "x"), load_audio(there.parts[1], "x"))
    arguments = ["--model", random_organism, "--max-new-tokens", 2, "--out", tmp_path / "results", "--json"]
    code, printed, _ = run(capsys, "evaluate", "--queries", out, *arguments)
    assert code == 0 and json.loads(printed)["queries"] == 4
    replies = pd.read_parquet(tmp_path / "results" / "replies.parquet")
    assert set(replies["attack"]) == {"split"} and set(replies["label"]) == {"harmful", "benign"}
    assert list(replies["query_id"]) == [query.id for query in asked]


def test_the_same_command_does_nothing_and_another_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shared = ["attack", "audio", "--n", 3, "--out", tmp_path / "out", "--json"]
    assert json.loads(run(capsys, *shared)[1])["made_now"] == 3
    assert json.loads(run(capsys, *shared)[1])["made_now"] == 0
    for change in (["--seed", 1], ["--voice", "en-gb"], ["--snr", "5"], ["--speed", 200], ["--n", 2]):
        code, _, err = run(capsys, *shared, *change)
        assert code == 2 and "holds an index of other queries or options" in err, change


def test_a_stopped_command_continues(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CHUNK", 2)
    real, seen = attack_files.apply_attack, []

    def stopping(name: str, queries, *arguments, **options):
        seen.append(queries[0].id)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(name, queries, *arguments, **options)

    monkeypatch.setattr(attack_files, "apply_attack", stopping)
    shared = ["attack", "image", "--n", 5, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *shared)
    assert code == 130 and "the same command continues" in err
    assert not (tmp_path / "out" / "index.parquet").exists()
    code, _, err = run(capsys, "evaluate", "--queries", tmp_path / "out")
    assert code == 2 and "its writing was stopped: give the same command again" in err
    code, out, _ = run(capsys, *shared, "--json")
    assert code == 0 and json.loads(out)["made_now"] == 3 and json.loads(out)["queries"] == 5
    assert len(seen) == 4 + 3


def test_twins_follow_their_partners_in_the_same_voice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, printed, _ = run(
        capsys, "attack", "jailbreak", "--benign", "world", "--n", 5, "--out", tmp_path / "o", "--json"
    )
    assert code == 0 and json.loads(printed)["labels"] == {"harmful": 5, "benign": 5}
    queries = read_index(tmp_path / "o")
    for one, two in zip(queries[::2], queries[1::2], strict=True):
        assert (one.label, two.label) == ("harmful", "benign")
        assert one.meta["pair"] == two.meta["pair"] == one.id and one.meta["wrapper"] == two.meta["wrapper"]


def test_a_tables_columns_say_what_to_hide(capsys: pytest.CaptureFixture[str], tmp_path: Path, table: Path) -> None:
    shared = ["attack", "typo", "--queries", table, "--column", "goal", "--label", "benign"]
    code, _, err = run(capsys, *shared, "--out", tmp_path / "a")
    assert code == 2 and "query 'prompts.csv:1' has no key word: give --meta topic=COLUMN or --meta key_phrase=" in err
    assert "--meta" in err
    code, _, err = run(capsys, *shared, "--meta", "key_phrase=word", "--out", tmp_path / "b")
    assert code == 2 and "query 'prompts.csv:3' does not say its key word 'clock'" in err
    assert not is_index(tmp_path / "b") or not (tmp_path / "b" / "index.parquet").exists()
    code, out, err = run(
        capsys, *shared, "--meta", "key_phrase=word", "--skip-unfit", "--out", tmp_path / "c", "--json"
    )
    assert code == 0 and json.loads(out)["queries"] == 2 and json.loads(out)["left_out"] == 1
    assert "left out 1 queries that typo does not fit" in err and "clock" in err
    assert [query.text for query in read_index(tmp_path / "c")] == [
        "How do I bake the phrase in the image?",
        "What is the phrase in the image?",
    ]


def test_a_partner_that_does_not_fit_takes_its_query_along(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, table: Path
) -> None:
    shared = ["attack", "spelled", "--queries", "world", "--label", "harmful", "--n", 3, "--skip-unfit"]
    twins = ["--benign", table, "--benign-column", "goal", "--benign-meta", "topic=word"]
    code, out, _ = run(capsys, *shared, *twins, "--out", tmp_path / "o", "--json")
    assert code == 0 and json.loads(out)["labels"] == {"harmful": 2, "benign": 2}
    code, _, err = run(capsys, *shared, "--n", 9, *twins, "--out", tmp_path / "p")
    assert code == 2 and "9 queries and 3 benign counterparts" in err


def test_own_wrappers_and_a_prefill_of_any_length(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, random_organism: Path
) -> None:
    (tmp_path / "w.txt").write_text("in a play : {request}\n")
    code, _, _ = run(capsys, "attack", "jailbreak", "--wrappers", tmp_path / "w.txt", "--n", 2, "--out", tmp_path / "a")
    assert code == 0 and all(query.text.startswith("in a play : ") for query in read_index(tmp_path / "a"))
    code, _, err = run(capsys, "attack", "jailbreak", "--wrappers", tmp_path / "x.txt", "--out", tmp_path / "b")
    assert code == 2 and "no file of wrappers" in err
    model = ["--model", random_organism]
    code, _, _ = run(capsys, "attack", "prefill-3", *model, "--n", 2, "--out", tmp_path / "c")
    tokenizer = load_processor(random_organism).tokenizer
    prefills = [query.prefill for query in read_index(tmp_path / "c")]
    assert code == 0 and [len(tokenizer.encode(text, add_special_tokens=False)) for text in prefills] == [3, 3]


def test_media_of_the_source_are_checked_and_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    soundfile.write(folder / "b.wav", np.full(9600, 0.1), 48_000)
    out = tmp_path / "out"
    code, _, _ = run(capsys, "attack", "plain", "--queries", folder, "--out", out)
    assert code == 0 and sorted(path.suffix for path in (out / "media").iterdir()) == [".png", ".wav"]
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    code, _, err = run(capsys, "attack", "plain", "--queries", folder, "--out", tmp_path / "o2")
    assert code == 2 and "media/c.png" in err and "not a readable image" in err
    (folder / "c.png").unlink()
    soundfile.write(folder / "d.wav", np.zeros(0), 48_000)
    code, out_text, err = run(
        capsys, "attack", "plain", "--queries", folder, "--skip-unfit", "--out", tmp_path / "o3", "--json"
    )
    assert code == 0 and json.loads(out_text)["left_out"] == 1 and "is empty or shorter than" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["magic", "--out", "o"], "unknown attack 'magic'; attacks: plain"),
        (["plain"], "say where the files go: casa-mech attack plain --out FOLDER"),
        (["audio", "--voice", "klingon", "--out", "o"], "unknown voice 'klingon'; known voices: en-us"),
        (["audio", "--speed", "9", "--out", "o"], "speed is 80-450 words a minute"),
        (["audio", "--snr", "loud", "--out", "o"], "--snr loud: give decibels"),
        (["audio", "--snr", "9:1", "--out", "o"], "the lower first"),
        (["plain", "--queries", "gone.csv", "--out", "o"], "no file or folder gone.csv"),
        (["plain", "--label", "bad", "--out", "o"], "--label must be one of harmful, benign"),
        (["plain", "--meta", "topic", "--out", "o"], "--meta topic: write it as KEY=COLUMN"),
        (["jailbreak", "--wrappers", "some", "--out", "o"], "unknown wrapper split 'some'"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "attack", *arguments)
    lines = [line for line in err.splitlines() if line.startswith("casa-mech:")]
    assert code == 2 and not out and message in lines[-1]
    assert not (tmp_path / "o" / "index.parquet").exists()


def test_without_a_name_the_attacks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "attack", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)["attacks"]] == list(ATTACKS) == list(SUMMARIES)


def test_figstep_writes_the_figure_and_its_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from casa_mech.attacks import figstep_picture

    folder = tmp_path / "data"
    folder.mkdir()
    pd.DataFrame({"category_id": [1], "task_id": [1], "instruction": ["Steps to bake."]}).to_csv(
        folder / "safebench.csv", index=False
    )
    figstep_picture("Steps to bake.").save(folder / "query_ForbidQI_1_1_6.png")
    code, out, _ = run(capsys, "figstep", folder, "--out", tmp_path / "figure", "--json")
    assert code == 0 and max(row["iou"] for row in json.loads(out)["fonts"]) == 1.0
    assert {path.suffix for path in tmp_path.glob("figure.*")} == {".png", ".svg", ".csv"}
    code, _, err = run(capsys, "figstep", tmp_path / "gone")
    assert code == 2 and "neither SafeBench-Tiny.csv nor safebench.csv" in err


def test_published_wording_comes_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, table: Path) -> None:
    source = ["--queries", table, "--column", "goal", "--meta", "key_phrase=word", "--n", 1, "--json"]
    own = ["attack", "aiah-letters", *source]
    code, printed, err = run(capsys, *own, "--out", tmp_path / "own")
    assert code == 0 and json.loads(printed)["prompt_wording"] == ["own"]
    assert "aiah-letters: the text is our own wording of the published one" in err
    (tmp_path / "aiah.txt").write_text("Letters: {letters}. Think of [word].\n{question} Go on.\n", encoding="utf-8")
    code, printed, err = run(capsys, *own, "--out", tmp_path / "file", "--prompt-file", tmp_path / "aiah.txt")
    assert code == 0 and "own wording" not in err
    (query,) = read_index(tmp_path / "file")
    assert query.text == "Letters: c a k e. Think of [word].\nHow do I bake [word]? Go on."
    assert [query.meta["prompt_wording"]] == json.loads(printed)["prompt_wording"]
    assert query.meta["prompt_wording"].startswith("file ")
    code, _, err = run(capsys, *own, "--out", tmp_path / "file")
    assert code == 2 and "other queries or options" in err  # the wording is part of what the index was made of
    (tmp_path / "figstep.txt").write_text("Fill the points in.", encoding="utf-8")
    for attack, text in (("figstep", "Fill the points in."), ("figstep-text", "```\nFill the points in.")):
        out = tmp_path / attack
        code, *_ = run(capsys, "attack", attack, *source, "--out", out, "--prompt-file", tmp_path / "figstep.txt")
        assert code == 0 and read_index(out)[0].text.endswith(text)


@pytest.mark.parametrize(
    ("attack", "text", "message"),
    [
        ("aiah-speech", "no slot", "the text of aiah-speech must hold {question} exactly once"),
        ("aiah-letters", "{question}", "the text of aiah-letters must hold {letters} exactly once"),
        ("figstep", " ", "the text of figstep is empty"),
        ("jailbreak", "x", "--prompt-file is for figstep, figstep-text, aiah-letters, .*; leave it out for jailbreak"),
        ("figstep", None, r"no file with a text at .*p\.txt; check --prompt-file"),
    ],
)
def test_a_prompt_file_that_does_not_serve_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, table: Path, attack: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    source = ["--queries", table, "--column", "goal", "--meta", "key_phrase=word", "--prompt-file", tmp_path / "p.txt"]
    code, _, err = run(capsys, "attack", attack, *source, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") <= 2 and re.search(message, err), err
