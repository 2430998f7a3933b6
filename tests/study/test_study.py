"""The run folder, its artifacts and the checks that come before a kernel starts."""

import json
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from casa_mech.casa import Casa
from casa_mech.errors import InputError, ModelError, RunError
from casa_mech.files import TEMPORARY
from casa_mech.study import Study
from casa_mech.study.folder import RunFolder, is_complete
from casa_mech.study.manifest import Manifest, data_hashes, versions
from casa_mech.study.notebooks import check_parameters, find_notebooks
from casa_mech.study.runner import run_study
from casa_mech.study.settings import PROFILES, StudySettings, settings_of

SIZES = {"n_eval": 4, "n_probe": 6, "train_examples": 16, "train_steps": 2, "train_batch": 4, "max_new_tokens": 3}


@pytest.fixture
def study(random_organism: Path, tmp_path: Path) -> Study:
    return _open(random_organism, tmp_path / "run")


def _open(model: Path, out: Path) -> Study:
    return Study.open(out, model=str(model), profile="smoke", progress=False, sizes=SIZES)


def test_default_profile_meets_the_sizes_asked_for() -> None:
    assert PROFILES["default"].n_eval >= 300
    assert [PROFILES[name].gates for name in ("smoke", "default", "full")] == [1, 3, 5]
    assert all(profile.n_eval % profile.gates == 0 for profile in PROFILES.values())
    assert PROFILES["smoke"].n_eval < PROFILES["default"].n_eval < PROFILES["full"].n_eval
    assert StudySettings().models == ("organism", "organism-split")
    assert StudySettings(model="a/b").models == ("a/b",)


@pytest.mark.parametrize("fields", [{"profile": "tiny"}, {"seed": -1}, {"unheard": 1}])
def test_bad_settings_are_named(fields: dict) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        settings_of(**fields)


def test_folder_is_bound_to_its_settings(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", StudySettings())
    RunFolder.open(tmp_path / "run", StudySettings(device="cpu"))
    with pytest.raises(RunError, match="seed=0, not 1"):
        RunFolder.open(tmp_path / "run", StudySettings(seed=1))


def _ask(root: Path, made: Path) -> None:
    def build(folder: Path) -> None:
        with made.open("a") as log:
            log.write("built\n")
        time.sleep(0.3)
        (folder / "content.txt").write_text("done")

    RunFolder(root).artifact("things", "one", {"n": 1}, build)


def test_what_several_processes_need_is_made_once(tmp_path: Path) -> None:
    root = RunFolder.open(tmp_path / "run", StudySettings()).root
    processes = [get_context("fork").Process(target=_ask, args=(root, tmp_path / "made")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "made").read_text() == "built\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"notes.txt": "mine"}, "holds other files"),
        ({"run.json": "{"}, "unreadable"),
        ({"run.json": "[]"}, "unreadable"),
    ],
)
def test_foreign_and_half_written_folders_are_refused(tmp_path: Path, content: dict, message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        RunFolder.open(tmp_path, StudySettings())
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == set(content)


def test_folder_in_the_way_and_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is there already"):
        RunFolder.open(tmp_path / "file", StudySettings())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="no space left"):
        RunFolder.open(tmp_path / "run", StudySettings())
    assert not list((tmp_path / "run").iterdir())


def test_artifacts_are_built_once_and_again_when_they_do_not_fit(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", StudySettings())
    built = []

    def build(new: Path) -> None:
        built.append(new)
        (new / "a.txt").write_text("content")

    for _ in range(2):
        path = folder.artifact("kind", "name", {"seed": 0}, build)
    assert len(built) == 1 and (path / "a.txt").read_text() == "content"
    folder.artifact("kind", "name", {"seed": 1}, build)
    (path / "a.txt").write_text("damaged")
    assert not is_complete(path, {"seed": 1})
    folder.artifact("kind", "name", {"seed": 1}, build)
    assert len(built) == 3 and (path / "a.txt").read_text() == "content"


def test_a_stopped_artifact_leaves_nothing_and_is_made_later(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", StudySettings())

    def stopped(new: Path) -> None:
        (new / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.artifact("kind", "name", {}, stopped)
    assert not list(folder.path("kind").iterdir())
    folder.artifact("kind", "name", {}, lambda new: (new / "whole").touch())
    assert folder.path("kind", "name", "whole").exists()


def test_lock_keeps_a_second_runner_out_and_clears_leftovers(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", StudySettings())
    (folder.root / f"{TEMPORARY}left").mkdir()
    with folder.locked():
        assert not list(folder.root.glob(f"{TEMPORARY}*"))
        code = (
            "import sys; from casa_mech.study.folder import RunFolder; from pathlib import Path\n"
            "try:\n    with RunFolder(Path(sys.argv[1])).locked(): print('in')\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        found = subprocess.run(
            [sys.executable, "-c", code, str(folder.root)], capture_output=True, text=True, check=True
        )
    assert found.stdout.startswith("RunError") and "in use by another run" in found.stdout


def test_gate_is_trained_once_and_found_again(study: Study, random_organism: Path) -> None:
    gate = study.casa()
    log = study.training_log()
    assert list(log["step"]) == [1, 2]
    assert {"loss", "v_harmful", "v_benign"} <= set(log.columns)
    assert [path.name for path in study.folder.path("gates").iterdir()] == ["random-organism"]
    again = _open(random_organism, study.folder.root)
    stamp = study.folder.path("gates", "random-organism", "done.json").stat().st_mtime_ns
    queries = study.queries("plain", "harmful", 4)
    first = [reply.v_s for reply in gate.decide(queries)]
    assert [reply.v_s for reply in again.casa().decide(queries)] == first
    assert study.folder.path("gates", "random-organism", "done.json").stat().st_mtime_ns == stamp


def test_stopped_training_is_continued(study: Study, random_organism: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Casa, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Casa, "save_pretrained", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.casa()
    left = [path.name for path in study.folder.path("gates").iterdir()]
    assert len(left) == 1 and left[0].startswith("training-")
    again = _open(random_organism, study.folder.root)
    again.casa()
    assert len(again.training_log()) == 2
    assert [path.name for path in again.folder.path("gates").iterdir()] == ["random-organism"]


def test_activations_readings_and_replies_are_shared(study: Study, random_organism: Path) -> None:
    activations = study.activations()
    assert set(activations.index["surface"]) == {"text", "image", "audio"}
    assert len(activations.index) == 2 * 3 * SIZES["n_probe"]
    readings = study.readings()
    assert set(readings["moment"]) == {"before", "after"}
    assert readings["v_s"].between(0, 1).all()
    study.omni().model.zero_grad()
    other = _open(random_organism, study.folder.root)
    np.testing.assert_array_equal(other.activations().states["norm"], activations.states["norm"])
    pd.testing.assert_frame_equal(other.readings(), readings)


def test_pretrained_cells_are_the_base_model_with_or_without_a_gate(study: Study, random_organism: Path) -> None:
    model = str(random_organism)
    before = study.replies(model, "pretrained", "plain", "harmful")
    fresh = Study.open(study.folder.root.parent / "other", model=model, profile="smoke", progress=False, sizes=SIZES)
    fresh.casa()
    after = fresh.replies(model, "pretrained", "plain", "harmful")
    assert list(before["reply"]) == list(after["reply"])
    assert before["v_s"].isna().all()
    assert fresh.replies(model, "CASA", "prefill-4", "harmful")["safety_token"].isin(["safe", "unsafe"]).all()


def _of_three(random_organism: Path, out: Path) -> Study:
    sizes = {**SIZES, "gates": 3, "n_eval": 6}
    return Study.open(out, model=str(random_organism), profile="smoke", progress=False, sizes=sizes)


def test_each_gate_has_its_own_start_examples_and_seed(random_organism: Path, tmp_path: Path) -> None:
    study = _of_three(random_organism, tmp_path / "run")
    weights = {gate: casa.attention.w_k.weight.detach().clone() for gate, casa in study.gates()}
    assert list(weights) == [0, 1, 2]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert study.casa(gate=0).omni is study.omni() and study.casa(gate=1).omni is not study.omni()
    assert torch.equal(study.casa(gate=1).attention.w_k.weight, weights[1])
    trained = [casa.training for _, casa in study.gates()]
    assert [record.settings.seed for record in trained if record] == [0, 1, 2]
    texts = [[example.query.text for example in study.training_examples(gate)] for gate in study.gate_numbers]
    assert texts[0] != texts[1] != texts[2] and study.training_examples() == study.training_examples(0)


def test_gate_0_is_the_gate_of_a_study_of_one(random_organism: Path, tmp_path: Path) -> None:
    one, three = _open(random_organism, tmp_path / "one"), _of_three(random_organism, tmp_path / "three")
    for name, value in one.casa().attention.state_dict().items():
        assert torch.equal(three.casa().attention.state_dict()[name], value)
    pd.testing.assert_frame_equal(one.readings(), three.readings())


def test_gates_answer_the_first_of_the_requests_that_the_pretrained_model_answers(
    random_organism: Path, tmp_path: Path
) -> None:
    study, model = _of_three(random_organism, tmp_path / "run"), str(random_organism)
    base = study.replies(model, "pretrained", "plain", "harmful", gate=2)
    assert len(base) == 6 and base["gate_seed"].isna().all()
    for gate in study.gate_numbers:
        replies = study.replies(model, "CASA", "plain", "harmful", gate)
        assert list(replies["query_id"]) == list(base["query_id"])[:2]
        assert list(replies["gate_seed"]) == [gate, gate]
        decided = [reply.v_s for reply in study.casa(gate=gate).decide(study.queries("plain", "harmful", 2))]
        assert list(replies["v_s"]) == pytest.approx(decided)


def test_the_attack_table_averages_over_gates(
    random_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three gates with attack success 1, 0 and 0 on two topics: a third, and nothing excluded by three seeds."""
    study, model = _of_three(random_organism, tmp_path / "run"), str(random_organism)
    asked: list[tuple[str, int]] = []

    def replies(model: str, defense: str, attack: str, label: str, gate: int = 0) -> pd.DataFrame:
        asked.append((defense, gate))
        gated = defense != "pretrained"
        outcome = "complied" if not gated or gate == 0 else "refused"
        rows = {
            "model": model, "defense": defense, "attack": attack, "surface": "text", "label": label,
            "query_id": ["a", "b"], "topic": ["a", "b"], "outcome": outcome,
            "gate_seed": pd.array([gate if gated else pd.NA] * 2, dtype="Int64"),
        }  # fmt: skip
        return pd.DataFrame(rows)

    monkeypatch.setattr(study, "replies", replies)
    monkeypatch.setattr(study, "train_gates", lambda *models: None)
    cells: list[tuple[str, str, str, str]] = [(model, name, "plain", "harmful") for name in ("pretrained", "CASA")]
    monkeypatch.setattr(study, "cells", lambda: cells)
    table = study.attack_results().set_index(["defense", "metric"])
    assert asked == [("pretrained", 0), ("CASA", 0), ("CASA", 1), ("CASA", 2)]
    assert table.loc[("pretrained", "attack_success"), ["n", "value"]].tolist() == [2, 1.0]
    n, value, low, high = table.loc[("CASA", "attack_success"), ["n", "value", "low", "high"]]
    assert (n, value) == (6, pytest.approx(1 / 3)) and (low, high) == (0.0, 1.0)


def test_missing_gates_are_trained_in_processes(
    random_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**SIZES, "gates": 2}
    study, alone = (
        Study.open(tmp_path / name, model=str(random_organism), profile="smoke", progress=False, sizes=sizes)
        for name in ("processes", "alone")
    )
    monkeypatch.setattr(Study, "_train", lambda *_: pytest.fail("trained in the process that asked"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    study.train_gates()
    monkeypatch.undo()
    assert sorted(path.name for path in study.folder.path("gates").iterdir()) == [
        random_organism.name, f"{random_organism.name}-gate1",
    ]  # fmt: skip
    for gate in study.gate_numbers:
        ours, theirs = (each.casa(gate=gate).attention.state_dict() for each in (study, alone))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_gate_that_another_process_trains_is_left_to_it(
    random_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = _of_three(random_organism, tmp_path / "run")
    order: list[int] = []
    train, held = Study._train, FileLock(study.folder.root / ".locks" / f"gates-{random_organism.name}.lock")
    Path(held.lock_file).parent.mkdir()

    def noted(self: Study, model: str, gate: int, new: Path) -> None:
        order.append(gate)
        train(self, model, gate, new)
        if gate == 2:
            held.release()

    monkeypatch.setattr(Study, "_train", noted)
    with held:
        study.train_gates()
    assert order == [1, 2, 0]


def test_cells_cover_every_attack_and_the_benign_side(study: Study) -> None:
    cells = study.cells()
    assert len(cells) == len(set(cells))
    attacks = {attack for _, defense, attack, label in cells if label == "harmful" and defense == "CASA"}
    assert {"plain", "jailbreak", "spelled", "image", "audio", "spoken", "prefill-2", "prefill-12"} <= attacks
    harmful, benign = (study.queries("plain", label, 4) for label in ("harmful", "benign"))
    assert {query.meta["template_split"] for query in harmful + benign} == {"held_out"}
    assert [query.meta["template"] for query in harmful] != [query.meta["template"] for query in benign]


def test_parameters_are_checked_before_a_kernel_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casa_mech.study.runner.NotebookProcess", lambda *_, **__: pytest.fail("one was started"))
    for given, message in (({"n_evil": 3}, "no notebook parameter 'n_evil'.*n_eval"), ({"n_eval": "many"}, "type int")):
        with pytest.raises(InputError, match=message):
            run_study(StudySettings(), tmp_path / "run", parameters=given)
    with pytest.raises(InputError, match="01_separability, 02_casa_training, 03_attack_success"):
        run_study(StudySettings(), tmp_path / "run", only=["99"])
    assert not (tmp_path / "run").exists()


def test_parameters_reach_the_notebooks_that_take_them() -> None:
    notebooks = find_notebooks(["02", "attack_success"])
    assert [book.name for book in notebooks] == ["02_casa_training", "03_attack_success"]
    given = check_parameters(notebooks, {"n_eval": "7", "train_steps": 5})
    assert given == {"02_casa_training": {"train_steps": 5}, "03_attack_success": {"n_eval": 7, "train_steps": 5}}


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    study = Study.open(tmp_path / "run", model="nothing-here", profile="smoke", progress=False)
    with pytest.raises(ModelError) as caught:
        study.omni()
    assert "\n" not in str(caught.value)


def test_manifest_round_trips(tmp_path: Path) -> None:
    manifest = Manifest(
        settings={}, parameters={}, arguments=[], versions=versions(), git=None, models={}, data=data_hashes(),
        outputs={}, timings={}, started="a", finished="b",
    )  # fmt: skip
    manifest.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == manifest
    assert "organism/world.json" in json.loads((tmp_path / "manifest.json").read_text())["data"]
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="run the study again"):
        Manifest.read(tmp_path / "manifest.json")
