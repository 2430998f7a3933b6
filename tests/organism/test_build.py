"""Building: checked before any work, and resumed to the same weights wherever it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from casa_mech.cli import main
from casa_mech.errors import InputError, RunError
from casa_mech.organism import build, card, recipe
from casa_mech.organism.architecture import OrganismShape
from casa_mech.organism.build import CHECKPOINT, LOCK
from casa_mech.organism.premises import ALL
from casa_mech.organism.recipe import RECIPES, Letters, stage_keys
from casa_mech.organism.training import Checkpoint

SHAPE = OrganismShape(
    d_model=32, layers=1, heads=2, kv_heads=1, d_mlp=32, vision_width=32, vision_layers=1, audio_width=32,
    audio_layers=1,
)  # fmt: skip
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.organism import test_build
from casa_mech.organism import recipe
from casa_mech.organism.training import Checkpoint

recipe.RECIPES["organism"] = test_build.tiny("organism")
write = Checkpoint._write

def write_and_die(self, step, *rest):
    write(self, step, *rest)
    if (self.stage, step) == (1, 4):
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint._write = write_and_die
test_build.build("organism", Path(sys.argv[1]), n=1, progress=False, checkpoint_every=4)
"""


def tiny(name: str) -> recipe.Recipe:
    """The recipe with a few steps of a few rows in a stage and the smallest of models."""
    stages = tuple(
        replace(stage, steps=6) if isinstance(stage, Letters) else replace(stage, steps=6, batch_size=3)
        for stage in RECIPES[name].stages
    )
    return replace(RECIPES[name], stages=stages, shape=SHAPE)


@pytest.fixture
def tiny_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """`organism` trains in seconds."""
    monkeypatch.setitem(recipe.RECIPES, "organism", tiny("organism"))


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights file of a build that nobody stopped."""
    folder = tmp_path_factory.mktemp("unstopped") / "organism"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.RECIPES, "organism", tiny("organism"))
        build("organism", folder, n=1, progress=False)
    return (folder / "model.safetensors").read_bytes()


def test_a_killed_build_goes_on_to_the_same_weights(tmp_path: Path, tiny_recipe: None, unstopped: bytes) -> None:
    out = tmp_path / "new"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (out / CHECKPOINT).exists() and not (out / "config.json").exists()
    build("organism", out, n=1, progress=False, checkpoint_every=4)
    assert (out / "model.safetensors").read_bytes() == unstopped
    assert not (out / CHECKPOINT).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("stop", [(0, 4), (2, 0), (2, 4), (3, 4), (5, 4), (6, 4), (7, 0)])
def test_a_build_goes_on_from_every_kind_of_stage(
    tmp_path: Path, tiny_recipe: None, unstopped: bytes, stop: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoint._write

    def write_and_stop(self: Checkpoint, step: int, *rest: object) -> None:
        write(self, step, *rest)  # type: ignore[arg-type]
        if (self.stage, step) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            build("organism", tmp_path / "new", n=1, progress=False, checkpoint_every=4)
    torch.rand(3)
    record = build("organism", tmp_path / "new", n=1, progress=False, checkpoint_every=4)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == unstopped
    assert json.loads((tmp_path / "new" / "card.json").read_text()) == record


def test_a_finished_build_returns_its_card_and_another_is_refused(tmp_path: Path, tiny_recipe: None) -> None:
    record = build("organism", tmp_path / "new", n=1, progress=False)
    assert build("organism", tmp_path / "new", n=1, progress=False) == record
    with pytest.raises(RunError, match="other options"):
        build("organism", tmp_path / "new", seed=1, n=1, progress=False)


def test_what_would_fail_at_the_end_fails_first(
    tmp_path: Path, tiny_recipe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("worked before the check")

    for function, name in (("build", "train_organism"), ("card", "load_omni")):
        # The package's `build` and `card` are functions, which hide the modules of the same names.
        monkeypatch.setattr(sys.modules[f"casa_mech.organism.{function}"], name, never)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds other files \(notes.txt"):
        build("organism", tmp_path, n=1)
    with pytest.raises(RunError, match="cannot write"):
        build("organism", tmp_path / "notes.txt" / "new", n=1)
    with pytest.raises(RunError, match="cannot write"):
        card("organism", n=1, out=tmp_path / "notes.txt" / "new")
    with pytest.raises(InputError, match="n=0"):
        build("organism", tmp_path / "new", n=0)
    assert [path.name for path in tmp_path.iterdir() if path.name != LOCK] == ["notes.txt"]


def test_a_second_build_of_one_folder_is_refused(tmp_path: Path, tiny_recipe: None) -> None:
    with FileLock(tmp_path / LOCK), pytest.raises(RunError, match="in use by another build"):
        build("organism", tmp_path, n=1)


def test_a_checkpoint_of_another_build_is_refused(tmp_path: Path, tiny_recipe: None) -> None:
    checkpoint = Checkpoint(tmp_path / CHECKPOINT, ["another", "build"])
    checkpoint.finish_stage(torch.nn.Linear(1, 1))
    with pytest.raises(RunError, match="other options"):
        build("organism", tmp_path, n=1, progress=False)
    (tmp_path / CHECKPOINT).write_bytes(b"half")
    with pytest.raises(RunError, match="cannot be read"):
        build("organism", tmp_path, n=1, progress=False)


def test_a_build_starts_from_another_trainings_first_stages(
    tmp_path: Path, tiny_recipe: None, unstopped: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe.RECIPES["organism"]
    reading = replace(whole, stages=whole.stages[:-1])
    checkpoint = Checkpoint(tmp_path / "reading.safetensors", stage_keys(reading, 0), every=4)
    recipe.train_organism("organism", 0, reading, progress=False, checkpoint=checkpoint)
    stages: list[str] = []
    train_stage = recipe.train_stage
    monkeypatch.setattr(recipe, "train_stage", lambda *rest: stages.append(rest[2].name) or train_stage(*rest))
    build("organism", tmp_path / "new", n=1, progress=False, start=tmp_path / "reading.safetensors")
    assert stages == ["safety"]
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == unstopped
    with pytest.raises(RunError, match="other options"):
        build("organism", tmp_path / "other", seed=1, n=1, start=tmp_path / "reading.safetensors")


def test_the_command_line_sets_knobs_and_checks_them_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, object]] = []

    def fake_build(name: str, **options: object) -> dict[str, object]:
        calls.append(options)
        return {"build": {"seconds": 0}}

    monkeypatch.setattr("casa_mech.organism.build", fake_build)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["organism", "build", "organism", "--knob", "tolerance=off", "--knob", "rules=0.5", "--json"])
    assert not ended.value.code and "organism" in capsys.readouterr().out
    assert calls[0]["premises"] == ALL.model_copy(update={"tolerance": 0.0, "rules": 0.5})
    with pytest.raises(SystemExit) as ended:
        main(["organism", "build", "--knob", "colour=red"])
    assert ended.value.code == 2 and "sets no knob" in capsys.readouterr().err
    assert len(calls) == 1
