"""Hostile and mistaken command lines: status 2, one line that names the option or file, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from helpers.command import run
from helpers.judge_server import Step, openai, serving

from casa_mech.cli import main
from casa_mech.cli.printing import as_text, show
from casa_mech.compare.command import open_folder
from casa_mech.locks import locked


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def table(name: str, **columns: list[object]) -> str:
    pd.DataFrame(columns).to_csv(name, index=False)
    return name


TWO = {"prompt": ["bake a cake", "make a bomb"], "label": ["benign", "harmful"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--hard"], "--hard is about a gate, and there is none: give --gate"),
        (["generate", "hi", "--order", "prefill_first"], "--order prefill_first is about a gate"),
        (["generate", "a\udcffb"], r"the argument 'a\udcffb' is not UTF-8"),
        (["evaluate", "--queries", "\udcff.csv"], "is not UTF-8: give the text as UTF-8, or rename the file"),
        (["generate", "x" * 200_001], "PROMPT: a text of 200,001 characters, and 200,000 are read"),
        (["generate", "hi", "--prefill", "x" * 200_001], "--prefill: a text of 200,001 characters"),
        (["compare", "--axes", "beta"], "--axes is of the second grid: give --ablations too"),
        (["compare", "--seeds", ""], "--seeds is empty: give names with commas between"),
        (["compare", "--seeds", "0,1,0"], "--seeds 0,1,0: give each seed once"),
        (["compare", "--seeds", "-1"], "--seeds -1: give each seed once, from 0 to"),
        (["compare", "--seeds", str(2**80)], "give each seed once, from 0 to"),
        (["compare", "--defenses", " , "], "--defenses is empty"),
        (["attack", "prefill-0", "--out", "a"], "unknown attack 'prefill-0'"),
        (["attack", "plain", "--out", "a", "--seed", str(2**80)], "Invalid value for '--seed'"),
        (["train", "--out", "a", "--option", "layer=" + "[" * 100_000], "--option layer: its value is nested too deep"),
        (["run", "--control", "nosuch"], "--control: unknown model 'nosuch'"),
        (["run", "--model", "nosuch"], "unknown model 'nosuch'"),
        (["judge", "run", "--replies", "gone.csv", "--judge", "keyword", "--out", "j"], "gone.csv: no such file"),
        (["judge", "run", "--replies", "t.csv", "--judge", "keyword", "--out", "j", "--backend", "openai"],
         "the judge keyword asks no model"),
        (["evaluate", "--queries", "t.csv", "--judge-model", "m"], "are for a judge: name it with --judge"),
        (["judge", "run", "--replies", "t.csv", "--judge", "pipe.json", "--judge-model", "m", "--backend", "openai",
          "--out", "j"], "no file with a rubric at pipe.json"),
        (["evaluate", "--queries", "t.csv", "--queries", "../here/t.csv"], "t.csv is given twice"),
        (["evaluate", "--queries", "pipe.json"], "pipe.json is a pipe or device"),
        (["attack", "aiah-speech", "--out", "a", "--prompt-file", "pipe.json"], "no file with a text at pipe.json"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_done(
    arguments: list[str], message: str, elsewhere: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    table("t.csv", **TWO)
    os.mkfifo("pipe.json")
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and message in err.splitlines()[-1]
    assert {path.name for path in elsewhere.iterdir()} == {"t.csv", "pipe.json"}


def test_a_long_prompt_is_refused_by_id_before_anything_runs(
    random_organism: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casa_mech.omni.model.Omni.write", lambda *_: pytest.fail("a reply was generated"))
    table("t.csv", prompt=["bake a cake", "cake " * 30_000])
    code, out, err = run(capsys, "evaluate", "--model", random_organism, "--queries", "t.csv", "--out", "o")
    assert (code, out) == (2, "") and not Path("o").exists()
    assert "query t.csv:2: its prompt has 30,0" in err.splitlines()[-1] and "reads at most 4,096" in err
    table("e.csv", prompt=["cake " * 30_000, "tea"], reply=["no", "yes"], label=["harmful", "benign"])
    code, _, err = run(capsys, "train", "--model", random_organism, "--data", "e.csv", "--out", "g", "--steps", "1")
    assert code == 2 and "query e.csv:1: its prompt has 30,0" in err.splitlines()[-1]


def test_training_data_that_cannot_be_learned_from_is_named(
    random_organism: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"make a {word}" for word in "abcd"] + [f"bake a {word}" for word in "abcd"]
    rows = {"prompt": texts, "reply": ["x"] * 8, "label": ["harmful"] * 4 + ["benign"] * 4}
    shared = ["train", "--model", random_organism, "--steps", "1", "--batch-size", "4", "--out", "g"]
    code, _, err = run(capsys, *shared, "--data", table("e.csv", **rows), "--option", "validation=0.99")
    assert code == 2 and "validation=0.99: none of the 4 benign examples would be left" in err.splitlines()[-1]
    rows["prompt"][7] = texts[0]
    code, _, err = run(capsys, *shared, "--data", table("e.csv", **rows))
    assert code == 2 and "queries e.csv:1 (harmful) and e.csv:8 (benign) have the same prompt" in err.splitlines()[-1]
    code, _, err = run(capsys, *shared, "--data", "e.csv", "--defense", "circuit-breaker", "--option", "steps=1")
    assert code == 2 and 'meta["' not in err and "Casa." not in err


def test_one_prompt_under_both_labels_is_said(random_organism: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table("t.csv", prompt=["bake a cake", "Bake a cake", "tea"], label=["benign", "harmful", "benign"])
    code, _, err = run(capsys, "evaluate", "--model", random_organism, "--queries", "t.csv", "--max-new-tokens", "1")
    assert code == 0 and "warning: 1 prompts are there as harmful and as benign, first t.csv:2 and t.csv:1" in err


def test_a_desktops_files_do_not_stop_a_run_from_going_on(
    random_organism: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["evaluate", "--model", random_organism, "--queries", table("t.csv", **TWO), "--max-new-tokens", "1"]
    assert run(capsys, *call, "--out", "o")[0] == 0
    for name in (".DS_Store", "._replies.csv", "Thumbs.db", "desktop.ini"):
        Path("o", name).write_text("")
    assert run(capsys, *call, "--out", "o")[0] == 0
    Path("o", "mine.txt").write_text("")
    code, _, err = run(capsys, *call, "--out", "o")
    assert code == 2 and "holds other files (mine.txt" in err


def test_replies_are_no_formulas_in_csv_and_themselves_in_parquet(
    random_organism: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casa_mech.omni.model.Omni.decode", lambda *_: "=cmd|' /C calc'!A0")
    call = ["evaluate", "--model", random_organism, "--queries", table("t.csv", **TWO), "--max-new-tokens", "1"]
    assert run(capsys, *call, "--out", "o")[0] == 0
    assert set(pd.read_csv("o/replies.csv")["reply"]) == {"'=cmd|' /C calc'!A0"}
    assert set(pd.read_parquet("o/replies.parquet")["reply"]) == {"=cmd|' /C calc'!A0"}
    read = []
    monkeypatch.setattr(
        "casa_mech.judging.judges.KeywordJudge.judge", lambda _, query, reply: read.append(reply) or pytest.skip("read")
    )
    with pytest.raises(pytest.skip.Exception):
        main(["judge", "run", "--replies", "o/replies.csv", "--judge", "keyword", "--out", "j"])
    assert read == ["=cmd|' /C calc'!A0"]


def test_two_judges_at_once_in_one_folder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["judge", "run", "--replies", table("r.csv", prompt=["a"], reply=["sorry"]), "--judge", "keyword"]
    assert run(capsys, *call, "--out", "j")[0] == 0
    holder = (
        "import sys; from casa_mech.locks import locked\nwith locked('j'): print('held', flush=True), sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        code, out, err = run(capsys, *call, "--out", "j")
        assert (code, out) == (2, "") and f"is in use by process {other.pid}" in err
        other.communicate("")
    assert run(capsys, *call, "--out", "j")[0] == 0
    with locked("j"):
        pass


def test_an_interruption_of_a_judge_that_never_answers_takes_about_a_second(elsewhere: Path) -> None:
    table("r.csv", prompt=["a", "b"], reply=["x", "y"])
    with serving(lambda *_: Step(body=openai("VERDICT: NO"), wait=30.0)) as server:
        call = ["judge", "run", "--replies", "r.csv", "--judge", "yes-no", "--backend", "openai", "--judge-model", "m",
                "--base-url", server.url, "--out", "j"]  # fmt: skip
        environment = {**os.environ, "OPENAI_API_KEY": "k", "NO_PROXY": "127.0.0.1"}
        with subprocess.Popen(
            [sys.executable, "-m", "casa_mech", *call], stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            until = time.monotonic() + 60
            while len(server.requests) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            lines = list(iter(process.stderr.readline, ""))
            assert process.wait() == 130 and not [line for line in lines if "Traceback" in line]
            assert "the same command continues from there" in lines[-1]
            # Far from the 30 s of the answers; the end of an interpreter that holds torch is most of it.
            assert time.monotonic() - began < 15


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {
        "a": float("nan"),
        "b": [float("inf")],
        "c": pd.NA,
        "d": pd.Series([1, 2]).sum(),
        "e": pd.Series([0.5])[0],
    }
    show({**numbers, "f": {"g": -float("inf")}}, as_json=True)
    printed = capsys.readouterr().out
    content = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content == {"a": None, "b": [None], "c": None, "d": 3, "e": 0.5, "f": {"g": None}}


def test_what_is_left_of_rounding_is_printed_as_nothing() -> None:
    assert as_text({"low": 2.776e-17, "rows": [{"name": "x", "low": -2.776e-17, "p": 0.0123}]}) == (
        "low: 0.0\nrows:\n  name  low  p\n  x     0    0.0123"
    )


def test_a_terminal_of_ascii_shows_escapes(random_organism: Path, elsewhere: Path) -> None:
    Path("run.py").write_text(
        "from casa_mech.cli import main\nfrom casa_mech.cli.printing import show\n"
        "from casa_mech import cli\n"
        "cli.app = lambda _: show({'text': 'na\\u00efve \\u4e2d'}, False)\nmain([])\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    printed = subprocess.run([sys.executable, "run.py"], env=environment, capture_output=True, check=True)
    assert printed.stdout == b"text: na\\xefve \\u4e2d\n"


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line_of_ours(
    random_organism: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["train", "--model", random_organism, "--out", "g", "--steps", "1", "--batch-size", "4", "--examples", "8"]
    assert run(capsys, *call)[0] == 0
    config = json.loads(Path("g/casa_config.json").read_text())
    config["base"]["fingerprint"] = "0" * 64
    Path("g/casa_config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "generate", "tea", "--model", random_organism, "--gate", "g", "--max-new-tokens", "1")
    lines = [line for line in err.splitlines() if "not on these weights" in line]
    assert code == 0 and len(lines) == 1 and lines[0].startswith("casa-mech: warning: g was trained on ")
    assert "UserWarning" not in err


def test_a_read_that_fails_is_not_told_as_a_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: object) -> None:
        raise PermissionError(13, "Permission denied", "secret.csv")

    monkeypatch.setattr("casa_mech.cli.app", denied)
    code, _, err = run(capsys, "datasets")
    assert code == 2 and "secret.csv cannot be used (Permission denied)" in err and "write" not in err


def test_a_backend_that_matplotlib_lacks_is_named(elsewhere: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "casa_mech", "compare", "--defenses", "none"],
        env={**os.environ, "MPLBACKEND": "foo"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2 and not list(elsewhere.iterdir())
    assert ended.stderr == "casa-mech: MPLBACKEND=foo: matplotlib has no such backend; unset it, or set it to agg\n"


def test_a_cut_off_marker_of_a_comparison_loses_nothing(elsewhere: Path) -> None:
    folder = open_folder(elsewhere / "grid")
    (folder.root / "cells").mkdir()
    for content in ('{"schema_', "", "[]", "{}", "\x00\x00"):
        (folder.root / "compare.json").write_text(content)
        open_folder(elsewhere / "grid")
        assert json.loads((folder.root / "compare.json").read_text()) == {"schema_version": 1}


def test_counting_goes_on_after_a_damaged_set(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sets").mkdir()
    Path("sets/harmful_behaviors.csv").write_bytes(b"\xff\xfe\xff")
    Path("sets/xstest_prompts.csv").write_text("id,prompt,type,label,focus,note\n1,how do i kill a process,x,safe,,\n")
    code, out, err = run(capsys, "datasets", "--data", "sets", "--count", "--json")
    rows = {row["name"]: row for row in json.loads(out)["datasets"]}
    assert code == 0 and rows["advbench"]["read"] == "damaged" and rows["xstest"]["read"] == 1, err
    assert len(err.splitlines()) == 1 and "advbench cannot be read" in err and "harmful_behaviors.csv" in err


def test_configurations_of_models_that_are_wrong_are_one_line(
    random_organism: Path, elsewhere: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((random_organism / "config.json").read_text())
    text = whole["text_config"]
    wrong: list[object] = [
        {**whole, "text_config": 5}, {**whole, "text_config": {**text, "hidden_size": "a"}},
        {**whole, "text_config": {**text, "hidden_size": 0}}, {**whole, "text_config": {**text, "hidden_size": -1}},
        {**whole, "text_config": {**text, "num_attention_heads": 0}},
        {**whole, "text_config": {**text, "num_attention_heads": 3}},
        {**whole, "text_config": {**text, "num_hidden_layers": None}},
        {**whole, "text_config": {**text, "hidden_act": "nope"}},
        {**whole, "text_config": {**text, "vocab_size": 10**12}},
        {**whole, "text_config": {**text, "torch_dtype": "float128"}}, {**whole, "model_type": ["qwen2_5_omni"]},
        {**whole, "model_type": None}, {**whole, "vision_config": "a"}, {**whole, "thinker_config": 7}, [], 7,
        "[" * 100_000, "", b"\xff\xfe",
    ]  # fmt: skip
    shutil.copytree(random_organism, "model")
    for config in wrong:
        content = config if isinstance(config, str | bytes) else json.dumps(config)
        Path("model/config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        code, out, err = run(capfd, "generate", "tea", "--model", "model")
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("casa-mech: "), (config, err)
        assert ("model" in err and "config.json" in err) or "model type" in err
    shutil.copy(random_organism / "config.json", "model/config.json")
    for name, content in (("tokenizer.json", "{}"), ("processor_config.json", "[]")):
        Path("model", name).write_text(content)
        code, _, err = run(capfd, "generate", "tea", "--model", "model")
        assert code == 2 and len(err.splitlines()) == 1 and "model: the processor cannot be loaded" in err
        shutil.copy(random_organism / name, Path("model", name))
    for content in ("[]", '{"weight_map": []}', '{"weight_map": {"a": "../secret.safetensors"}}', "[" * 100_000):
        Path("model/model.safetensors.index.json").write_text(content)
        code, _, err = run(capfd, "generate", "tea", "--model", "model")
        assert code == 2 and len(err.splitlines()) == 1 and "model.safetensors.index.json" in err
