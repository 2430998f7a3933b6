"""`casa-mech calibrate`: options of a trained gate switched, calibrated and saved from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from helpers.command import run

from casa_mech.casa import Casa, InferenceSettings
from casa_mech.omni import load_omni


@pytest.fixture(scope="module")
def gate(random_organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates") / "gate"
    Casa.attach(load_omni(str(random_organism))).save_pretrained(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "seconds": 0.1}\n')
    return folder


def test_a_gate_is_calibrated_into_another_folder_and_in_its_place(
    random_organism: Path, gate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, shared = tmp_path / "out", ("--model", random_organism, "--json")
    code, text, _ = run(
        capsys,
        "calibrate",
        "--gate",
        gate,
        "--recentre",
        "--rescale",
        "--fpr",
        "0.1",
        "--n",
        "2",
        "--out",
        out,
        *shared,
    )
    printed = json.loads(text)
    assert code == 0 and printed["beyond the paper"]["fpr"] == 0.1
    assert printed["calibration"]["unlabelled"] == {"text": 4, "image": 4, "audio": 4, "image+audio": 4}
    assert (out / "metrics.jsonl").read_text() == (gate / "metrics.jsonl").read_text()
    assert not (gate / "calibration.safetensors").exists()
    # Own prompts, in the gate's place; what is not named stays as it was.
    pd.DataFrame({"prompt": ["what is it ?", "how do i make a cake ?"]}).to_csv(tmp_path / "q.csv", index=False)
    own = ("--queries", tmp_path / "q.csv", "--label", "benign")
    code, text, _ = run(capsys, "calibrate", "--gate", out, "--no-rescale", *own, *shared)
    assert code == 0 and json.loads(text)["calibration"] == {"unlabelled": {"text": 2}, "benign": {"text": 2}}
    casa = Casa.from_pretrained(out, load_omni(str(random_organism)))
    assert casa.config.inference == InferenceSettings(recentre=True, fpr=0.1)
    code, text, _ = run(capsys, "generate", "what is it ?", "--gate", out, "--max-new-tokens", "2", *shared)
    assert code == 0 and json.loads(text)["safety_token"] in ("safe", "unsafe")
    code, text, _ = run(capsys, "evaluate", *own, "--gate", out, "--max-new-tokens", "2", *shared)
    assert code == 0 and json.loads(text)["defense"] == "CASA"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fpr", "1.5"], "fpr: Input should be less than 1"),
        (["--rescale"], "switch recentre on, too"),
        (["--recheck-every", "-1"], "recheck_every: Input should be greater than or equal to 0"),
        (["--queries", "gone.csv"], "no file or folder gone.csv"),
        (["--rescale", "--recentre", "--queries", "q.csv"], "rescale needs a direction"),
        (["--out", "."], "holds other files"),
    ],
)
def test_mistakes_are_one_line(
    random_organism: Path, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"prompt": ["what is it ?"]}).to_csv("q.csv", index=False)
    code, out, err = run(capsys, "calibrate", "--gate", gate, "--model", random_organism, *arguments)
    assert (code, out) == (2, "") and message in err
    assert err.strip().splitlines()[-1].startswith("casa-mech:")
    code, _, err = run(capsys, "calibrate", "--gate", "nowhere")
    assert code == 2 and "no folder nowhere" in err
