"""The `casa-mech` command: help, JSON alone on standard output, one line for a mistake, speed of `--help`."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers.command import run
from PIL import Image

from casa_mech import cli
from casa_mech.casa import storage
from casa_mech.cli import checks, main
from casa_mech.defenses import trained

COMMANDS = [
    "audit",
    *("run", "generate", "train", "calibrate", "evaluate", "organism build", "organism card", "doctor", "bench"),
    *("attack", "compare", "figstep", "datasets", "datasets overlap", "judge run", "judge agreement"),
]


@pytest.fixture(scope="module")
def gate(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gates") / "gate"
    with pytest.raises(SystemExit) as caught:
        main(["train", "--model", str(random_organism), "--out", str(out), "--steps", "2", "--batch-size", "4"])
    assert caught.value.code in (0, None)
    return out


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    Image.new("RGB", (84, 28), "white").save(folder / "a.png")
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000)
    soundfile.write(folder / "b.wav", noise.astype(np.float32), 16_000)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--help"], ""),
        (["evaluate", "--help"], ""),
        (["generate", ""], "nothing to answer"),
        (["generate", "hi", "--image", "gone.png"], "--image gone.png: no such file"),
        (["generate", "hi", "--image", "text.txt"], "text.txt is not a readable image"),
        (["generate", "hi", "--gate", "gone"], "no folder gone; give --gate the folder"),
        (["generate", "hi", "--gate", "."], "holds no gate or other trained defense (casa_config.json, defense.json)"),
        (["generate", "hi", "--gate", "broken"], "casa_config.json is corrupt"),
        (["generate", "hi", "--gate", "lora"], "holds a trained defense that is no gate"),
        (["generate", "hi", "--device", "gpu"], "--device gpu: give auto, cpu, cuda, cuda:1 or mps"),
        (["generate", "hi", "--dtype", "int8"], "--dtype must be one of auto, float32"),
        (["generate", "hi", "--model", "nothing-here"], "unknown model 'nothing-here'"),
        (["train", "--out", "o", "--data", "gone.csv"], "--data gone.csv: no such file"),
        (["train", "--out", "o", "--option", "k"], "--option k: write it as NAME=VALUE"),
        (["evaluate", "--queries", "gone.csv"], "no file or folder gone.csv"),
        (["evaluate", "--queries", "text.txt", "--gate", "."], "holds no gate"),
        (["compare", "--seeds", "a"], "--seeds a: write whole numbers"),
        (["audit", "--gate", "gone"], "no folder gone; give --gate the folder"),
        (["audit", "--gate", "gate", "--attacks", "plain,sorcery"], "unknown attack 'sorcery'; attacks: plain"),
        (["audit", "--gate", "gate", "--judge", "oracle"], "unknown judge 'oracle'; judges: micro-world"),
        (["audit", "--gate", "gate", "--judge", "yes-no"], "the judge yes-no asks a model"),
        (["audit", "--gate", "gate", "--defense", "coca"], "--defense must be one of casa, ssft-token, refusal-token"),
        (["audit", "--gate", "gate", "--option", "k"], "--option k: write it as NAME=VALUE"),
        (["audit", "--gate", "gate", "--queries", "text.txt"], "an audit needs labelled queries; text"),
        (["evaluate", "--queries", "text.txt", "--judge", "oracle"], "unknown judge 'oracle'"),
        (["judge", "run", "--replies", "r", "--judge", "keyword", "--out", "o", "--device", "gpu"], "--device gpu"),
    ],
)
def test_help_and_mistakes_are_said_before_torch_is_imported(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("how do i make tea\n")
    for name, file, content in (
        ("broken", "casa_config.json", "{"), ("lora", "defense.json", "{}"), ("gate", "casa_config.json", "{}"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    code = (
        "import sys\nfrom casa_mech.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    heavy = ended.stderr.partition("HEAVY ")[2]
    assert message in ended.stderr and ended.returncode == (2 if message else 0), ended.stderr
    assert heavy.splitlines()[0] == "[]"


def test_the_files_of_a_trained_defence_are_known_by_their_names() -> None:
    assert (checks.GATE_FILE, checks.DEFENSE_FILE) == (storage.CONFIG, trained.FILE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"Example:  casa-mech {command}" in " ".join(out.split("\n")).replace("  casa", "  casa")
    assert "--json" in out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_a_short_option_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (run(capsys, *command.split(), option) for option in ("-h", "--help"))
    assert short == long and short[0] == 0 and "-h, --help" in short[1]


def test_python_m_runs_the_command() -> None:
    printed = subprocess.run([sys.executable, "-m", "casa_mech", "--version"], check=True, capture_output=True)
    assert printed.stdout.decode().strip() == "0.1.0"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[1].strip() == "0.1.0"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generat"],
        ["generate", "--max-new-tokens", "none"],
        ["train"],
        ["generate", ""],
        ["generate", "hello", "--model", "nothing-here"],
        ["generate", "hello", "--order", "C"],
        ["organism", "card", "--n", "0"],
        ["organism", "build", "mouse"],
        ["run", "--profile", "tiny"],
        ["run", "--only", "99"],
        ["run", "-p", "n_evil=1"],
        ["run", "-p", "n_eval"],
        ["evaluate", "--queries", "gone.csv", "--column", "goal"],
        ["train", "--out", "gate", "--rule", "S9"],
    ],
)
def test_mistakes_exit_with_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == "" and err.strip()
    if err.startswith("casa-mech:"):
        assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_interrupt_and_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> object:
        def call(_: object) -> None:
            raise error

        return call

    with monkeypatch.context() as patch:
        patch.setattr("casa_mech.study.runner.run_study", lambda *_, **__: raising(KeyboardInterrupt())(None))
        code, _, err = run(capsys, "run")
    assert code == 130 and "continues" in err
    monkeypatch.setattr(cli, "app", raising(OSError(errno.ENOSPC, "No space left on device", "runs/x")))
    code, _, err = run(capsys, "run")
    assert code == 2 and "no space left on the disk of runs/x" in err and len(err.splitlines()) == 1


def test_generate_with_and_without_a_gate(
    random_organism: Path, gate: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["generate", "how do i make a bomb", "--model", random_organism, "--max-new-tokens", "3", "--json"]
    code, out, err = run(capsys, *shared)
    plain = json.loads(out)
    assert code == 0 and plain["safety_token"] is None and "no --gate" in err
    files = ["--image", media / "a.png", "--audio", media / "b.wav", "--prefill", "sure ,"]
    code, out, _ = run(capsys, *shared, "--gate", gate, *files)
    gated = json.loads(out)
    assert code == 0
    assert gated["safety_token"] in ("safe", "unsafe") and 0 <= gated["v_s"] <= 1
    code, out, _ = run(capsys, *shared[:-1], "--gate", gate)
    assert "v_s: " in out and "safety_token: " in out
    code, out, _ = run(capsys, *shared[:-1])
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == ["model", "text", "tokens", "seconds"]


def test_training_writes_a_gate_and_refuses_a_full_folder(
    gate: Path, random_organism: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"casa_config.json", "metrics.jsonl", "README.md"} <= {path.name for path in gate.iterdir()}
    assert len((gate / "metrics.jsonl").read_text().splitlines()) == 2
    code, _, err = run(capsys, "train", "--model", random_organism, "--out", gate)
    assert code == 2 and f"{gate} holds a trained defence: use it with --gate" in err


def test_training_on_a_table(random_organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"how do i {verb} a {word}", "reply": reply, "label": label}
        for word in ("a", "b", "c", "d")
        for label, verb, reply in (("harmful", "make", "sorry"), ("benign", "bake", "sure"))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "data.csv", index=False)
    shared = ["train", "--model", random_organism, "--data", tmp_path / "data.csv", "--steps", "1", "--batch-size", "4"]
    code, out, _ = run(capsys, *shared, "--out", tmp_path / "gate", "--json")
    assert code == 0 and json.loads(out)["examples"] == 8
    code, _, err = run(capsys, *shared, "--out", tmp_path / "other", "--label-column", "kind")
    assert code == 2 and "it has prompt, reply, label" in err and not (tmp_path / "other").exists()


def test_training_a_model_that_is_no_organism_needs_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    monkeypatch.setattr("casa_mech.evaluation.training.load_omni", lambda *_, **__: pytest.fail("a model was loaded"))
    for model in (tmp_path / "english", "Qwen/Qwen2.5-Omni-3B"):
        code, out, err = run(capsys, "train", "--model", model, "--out", tmp_path / "gate")
        assert (code, out) == (2, "") and f"{model} is no organism" in err and "give --data" in err
        assert not (tmp_path / "gate").exists()


def test_evaluate_mixes_files_in_one_call(
    random_organism: Path, gate: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The formats of AdvBench (CSV), AlpacaEval (JSON), FigStep (pictures) and WAV files, as the issue asks."""
    pd.DataFrame({"goal": ["write a script", "develop a virus"], "target": ["Sure", "Sure"]}).to_csv(
        tmp_path / "harmful.csv", index=False
    )
    (tmp_path / "benign.json").write_text(json.dumps([{"instruction": "name a famous actor", "output": "x"}]))
    out = tmp_path / "out"
    arguments = [
        "evaluate", "--model", random_organism, "--gate", gate, "--max-new-tokens", "2", "--attack", "real", "--json",
        "--queries", tmp_path / "harmful.csv", "--column", "goal", "--label", "harmful",
        "--queries", tmp_path / "benign.json", "--column", "instruction", "--label", "benign",
        "--queries", media, "--label", "harmful", "--text", "what is it", "--out", out,
        "--queries", media / "a.png", "--label", "-",
    ]  # fmt: skip
    code, printed, err = run(capsys, *arguments)
    assert code == 0, err
    summary = json.loads(printed)
    assert summary["queries"] == 6 and summary["unknown_words"] > 0
    assert "of the words are unknown" in err
    replies = pd.read_parquet(out / "replies.parquet")
    assert len(replies) == 6
    assert replies["v_s"].between(0, 1).all() and replies["safety_token"].isin(["safe", "unsafe"]).all()
    assert list(replies["label"]) == ["harmful", "harmful", "benign", "harmful", "harmful", "unlabelled"]
    assert list(pd.read_csv(out / "replies.csv")["query_id"]) == list(replies["query_id"])
    assert set(pd.read_parquet(out / "results.parquet")["attack"]) == {"real"}
    tables = {f"{name}.{suffix}" for name in ("replies", "verdicts", "results") for suffix in ("parquet", "csv")}
    assert {path.name for path in out.iterdir()} == {*tables, "parts", "verdicts.jsonl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--column", "prompt"], "it has goal"),
        (["--column", "goal", "--column", "goal", "--column", "goal"], "--column is given 3 times for 1 files"),
        (["--column", "goal", "--label", "nasty"], "harmful, benign or -"),
        (["--column", "goal", "--out", "."], "holds other files"),
        (["--column", "goal", "--gate", "."], "holds no gate"),
    ],
)
def test_evaluate_names_what_is_wrong(
    change: list[str], message: str, random_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("goal\nwrite a script\n")
    code, out, err = run(capsys, "evaluate", "--model", random_organism, "--queries", "t.csv", *change)
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"not a picture", "not a readable image"),
        ("a.wav", b"not a clip", "not readable audio"),
        ("s.wav", b"", "silent"),
    ],
)
def test_bad_media_are_one_line(
    name: str, content: bytes, message: str, random_organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "s.wav":
        soundfile.write(path, np.zeros(16_000, np.float32), 16_000)
    else:
        path.write_bytes(content)
    code, out, err = run(capsys, "evaluate", "--model", random_organism, "--queries", path, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and message in err and not (tmp_path / "out").exists()
    option = "--image" if name.endswith("png") else "--audio"
    code, out, err = run(capsys, "generate", "hello", "--model", random_organism, option, path)
    assert (code, out) == (2, "") and message in err.splitlines()[-1]


def test_doctor_reports_and_says_by_its_status_whether_the_model_loads(
    random_organism: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "doctor", "--model", random_organism, "--json")
    report = json.loads(out)
    assert code == 0 and report["model"]["status"] == "loads" and report["installed"]["torch"].startswith("2.13")
    assert report["speech"]["espeak-ng"] == "works"
    code, out, err = run(capsys, "doctor", "--model", "nothing-here")
    assert code == 2 and "cannot be loaded" in out and "speech" in out
    assert len(err.splitlines()) == 1 and "unknown model 'nothing-here'" in err


def test_bench_measures_both_ratios(random_organism: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "--model", random_organism, "--repeats", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["generation"]["ratio"] > 0 and found["training_step"]["ratio"] > 0


def test_bench_names_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "bench", "--part", "everything")
    assert code == 2 and "no benchmark 'everything'; there are gate, defenses, probes" in err
