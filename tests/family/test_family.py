"""The map: parts in their order, stopped and continued, by one process or several; and the command, killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from helpers.command import run

from casa_mech.audit.names import SPLIT
from casa_mech.errors import InputError, RunError
from casa_mech.family import command, member
from casa_mech.family.command import TABLES, Request, check_order, family
from casa_mech.family.member import WEIGHTS
from casa_mech.family.mends import MENDS
from casa_mech.family.plan import Member, Plan, Sizes
from casa_mech.locks import locked
from casa_mech.organism import recipe as recipe_module
from casa_mech.organism.architecture import OrganismShape
from casa_mech.organism.premise_rows import SURFACES
from casa_mech.organism.premises import Premises
from casa_mech.organism.recipe import Letters, Recipe

SHAPE = OrganismShape(
    d_model=32, layers=1, heads=2, kv_heads=1, d_mlp=32, vision_width=32, vision_layers=1, audio_width=32,
    audio_layers=1,
)  # fmt: skip
SIZES = Sizes(card=2, states=12, audit=2, examples=32, steps=1, batch=4, gate_seeds=(0, 1), max_new_tokens=2)
PLAN = Plan(members=(Member(name="all", mends=True), Member(name="full", knobs=("alignment=full",))), sizes=SIZES)

FEW = {name: MENDS[name] for name in ("counterfactual tokens", "re-centred", "mended")}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Organisms of the smallest size that train in a step of a few rows in each stage."""
    whole = recipe_module.recipe_of

    def tiny_recipe(premises: Premises) -> Recipe:
        recipe = whole(premises)
        stages = tuple(
            replace(stage, steps=1) if isinstance(stage, Letters) else replace(stage, steps=1, batch_size=2)
            for stage in recipe.stages
        )
        return replace(recipe, stages=stages, shape=SHAPE)

    monkeypatch.setattr(member, "MENDS", FEW)
    monkeypatch.setattr("casa_mech.family.plan.recipe_of", tiny_recipe)
    monkeypatch.setattr(import_module("casa_mech.organism.build"), "recipe_of", tiny_recipe)


def quiet(line: str) -> None:
    pass


@pytest.fixture
def begun(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A map that was stopped in the audit of the first gate."""
    audit = member.audit

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(member, "audit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        family(Request(PLAN, tmp_path / "map"), note=quiet)
    monkeypatch.setattr(member, "audit", audit)
    return tmp_path / "map"


def test_a_stopped_map_goes_on_and_leaves_whole_tables(begun: Path) -> None:
    weights = begun / "members" / "all" / WEIGHTS
    organism = (weights / "organism" / "model.safetensors").stat().st_mtime_ns
    gate = (weights / "gate-0" / "casa_config.json").stat().st_mtime_ns
    assert (begun / "members" / "all" / "predictors" / "predictors.csv").is_file()
    assert not list(begun.glob("members/*/audit-*")) and not list(begun.glob("*.csv"))

    kept = family(Request(PLAN, begun, keep=True), note=quiet)
    assert kept["members"] == {"finished": 2, "in the plan": 2}
    assert (weights / "organism" / "model.safetensors").stat().st_mtime_ns == organism
    assert (weights / "gate-0" / "casa_config.json").stat().st_mtime_ns == gate
    # One gate of the paper and one with counterfactual tokens for each seed: two mends share the second.
    assert len(list(weights.glob("gate-0*"))) == 2
    # The two organisms have all stages but the last in common, which are trained once.
    assert len(list(begun.glob("stages/*/training.safetensors"))) == 1

    tables = {name: pd.read_csv(begun / f"{name}.csv") for name in TABLES}
    assert {name: len(table) for name, table in tables.items()} == kept["tables"]
    cells = 2 * len(SIZES.gate_seeds) * len(SURFACES)
    assert (
        len(tables["transfer"])
        == len(tables["transfer"][["member", "gate_seed", "surface"]].drop_duplicates())
        == cells
    )
    assert set(tables["transfer"]["surface"]) == set(SURFACES)
    assert len(tables["mends"]) == len(FEW) * len(SIZES.gate_seeds) * len(SURFACES)
    assert set(tables["mends"]["member"]) == {"all"}
    assert set(SPLIT) < set(tables["split"]["part"]) and len(tables["split"]) == cells * 2 * (len(SPLIT) + 3)
    alignment = tables["organisms"].groupby("member")["alignment"].first().to_dict()
    assert alignment == {"all": "partial", "full": "full"}
    assert set(tables["predictors"]["measure"]) >= {"shrinkage", "cosine", "probe_from_text", "tolerance"}

    record = json.loads((begun / "plan.json").read_text())
    assert record["plan"] == PLAN.model_dump(mode="json") and record["versions"]["torch"]
    steps = [step["step"] for step in record["order"] if step["member"] == "all"]
    assert steps[:3] == ["organism", "predictors", "audit-0"] and len(steps) == 4 + len(FEW) * 2
    check_order(record["order"])

    numbers = (begun / "transfer.csv").read_bytes()
    again = family(Request(PLAN, begun), note=quiet)
    assert again["tables"] == kept["tables"] and (begun / "transfer.csv").read_bytes() == numbers
    assert not list(begun.glob(f"members/*/{WEIGHTS}"))


def test_a_member_that_another_process_holds_is_left_to_it(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_POLL_SECONDS", 0.1)
    plan = PLAN.model_copy(update={"sizes": SIZES.model_copy(update={"gate_seeds": (0,)})})
    lines: list[str] = []
    with _elsewhere(tmp_path / "members" / "all") as let_go:

        def note(line: str) -> None:
            lines.append(line)
            if line == "full: audit-0 is done":
                let_go.set()

        family(Request(plan, tmp_path, mends=False), note=note)
    assert [line.split(":")[0] for line in lines] == 3 * ["full"] + 3 * ["all"]


def test_a_member_of_other_weights_is_not_gone_on_with(begun: Path) -> None:
    """Gates on a second build of an organism that came out otherwise would not be those its predictors are of."""
    from casa_mech.omni import load_omni
    from casa_mech.organism.build import save_organism
    from casa_mech.organism.card import write_card

    weights = begun / "members" / "all" / WEIGHTS / "organism"
    record = json.loads((weights / "card.json").read_text())
    with pytest.raises(RunError, match="was measured with n=2, not 3"):
        family(Request(PLAN.model_copy(update={"sizes": SIZES.model_copy(update={"card": 3})}), begun), note=quiet)
    omni = load_omni(weights, device="cpu", dtype="float32")
    omni.embedding.weight.data[0] += 1
    save_organism(omni, weights)
    changed = load_omni(weights, device="cpu", dtype="float32").fingerprint()
    write_card({**record, "fingerprint": changed}, weights)
    with pytest.raises(RunError, match="has other weights than"):
        family(Request(PLAN, begun), note=quiet)


@contextmanager
def _elsewhere(folder: Path) -> Iterator[threading.Event]:
    """A thread holds `folder` until the event is set."""
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(folder):
            held.set()
            let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        yield let_go
    finally:
        let_go.set()
        thread.join()


def test_a_gate_before_the_predictors_is_no_result() -> None:
    read = {"member": "a", "step": "predictors", "began": "2026-01-01T00:00:00", "finished": "2026-01-01T00:01:00"}
    gate = {"member": "a", "step": "audit-0", "began": "2026-01-01T00:01:00", "finished": "2026-01-01T00:02:00"}
    check_order([read, gate])
    for order in ([gate], [read, {**gate, "began": "2026-01-01T00:00:59"}], [{**read, "member": "b"}, gate]):
        with pytest.raises(RunError, match="a: audit-0 was begun before the predictors"):
            check_order(order)


def test_a_folder_or_member_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no member 'other'"):
        family(Request(PLAN, tmp_path / "map", ("other",)), note=quiet)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds other files \(thesis\.txt"):
        family(Request(PLAN, tmp_path), note=quiet)


def test_the_command_says_what_it_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "family", "--example")
    assert status == 0 and out.startswith("# The map") and "unasked-off-split" in out
    status, _, error = run(capsys, "family")
    assert status == 2 and "--out" in error
    status, _, error = run(capsys, "family", "--out", tmp_path / "map", "--members", "none-such")
    assert status == 2 and "no member 'none-such'" in error and not (tmp_path / "map").exists()


@pytest.mark.slow
def test_a_failure_in_a_process_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("all", "alignment-full"):
        foreign = tmp_path / "map" / "members" / name / WEIGHTS / "organism" / "card.json"
        foreign.parent.mkdir(parents=True)
        foreign.write_text("{}")
    (tmp_path / "map" / "family.json").write_text("{}")
    status, _, error = run(capsys, "family", "--plan", "smoke", "--out", tmp_path / "map")
    assert status == 2 and "is no record of a build" in error and error.strip().count("\n") == 0


@pytest.mark.slow
def test_a_killed_command_is_continued(tmp_path: Path) -> None:
    """kill -9 of the command ends its processes, and the same command finishes what they left."""
    import psutil

    out = tmp_path / "map"
    arguments = [sys.executable, "-m", "casa_mech", "family", "--plan", "smoke", "--no-mends"]
    arguments += ["--out", str(out), "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "members" / "all" / "organism").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]
    assert not (out / "plan.json").exists()
    measured = (out / "members" / "all" / "organism" / "done.json").stat().st_mtime_ns
    finished = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True, timeout=240)
    assert json.loads(finished.stdout)["members"] == {"finished": 2, "in the plan": 2}
    assert (out / "members" / "all" / "organism" / "done.json").stat().st_mtime_ns == measured
    assert {f"{name}.csv" for name in TABLES if name != "mends"} <= {path.name for path in out.iterdir()}
    assert not list(out.rglob("*.safetensors")) or list(out.rglob("*.safetensors")) == list(
        out.glob("stages/*/*.safetensors")
    )
