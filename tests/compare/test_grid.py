"""The comparison's grid: cells kept by what determines them, rows added, stops survived, the model given back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.full_disk import files_of_at_most

from casa_mech.compare import grid as grid_module
from casa_mech.compare.command import open_folder
from casa_mech.compare.grid import Grid, GridResult
from casa_mech.compare.sets import Cell, WorldSets
from casa_mech.compare.systems import DEFAULT_DEFENSES, ComparedSystem, system_named
from casa_mech.compare.tables import compact, grid_rows, summarise
from casa_mech.compare.weights import ExampleTable, TrainingPlan, Weights, training_cost
from casa_mech.defenses import load_defense
from casa_mech.errors import InputError, RunError
from casa_mech.files import TEMPORARY
from casa_mech.judging.results import RESULT_COLUMNS
from casa_mech.omni import GenerationSettings, Omni, load_omni
from casa_mech.queries import Query

PLAN = TrainingPlan(16, {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4})
NAMES = ("none", "casa", "casa+safety-prompt", "coca")


def make(folder: Path, omni: Omni, names: tuple[str, ...] = NAMES, n: int = 3, **fields: Any) -> Grid:
    store = open_folder(folder)
    weights = Weights(fields.pop("plan", PLAN), store, progress=False)
    rows = [system_named(name) for name in names]
    settings = GenerationSettings(max_new_tokens=3, batch_size=8)
    shared: dict[str, Any] = {"generation": settings, "rounds": 0, "progress": False, **fields}
    return Grid(omni, rows, WorldSets(("plain", "image"), n), (0,), store, weights, **shared)


@pytest.fixture(scope="module")
def omni(random_organism: Path) -> Omni:
    return load_omni(str(random_organism))


@pytest.fixture(scope="module")
def filled(omni: Omni, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GridResult]:
    folder = tmp_path_factory.mktemp("grids") / "grid"
    return folder, make(folder, omni, rounds=1).fill()


def test_every_cell_is_filled_and_the_model_given_back(omni: Omni, filled: tuple[Path, GridResult]) -> None:
    folder, result = filled
    assert (result.computed, result.reused) == (4 * 4, 0)
    sizes = result.replies.groupby(["defense", "attack", "label"]).size()
    assert len(sizes) == 16 and (sizes == 3).all()
    assert not hasattr(omni.model, "peft_config")
    assert len(list((folder / "trained").iterdir())) == 1  # casa with and without the prompt share one training
    assert not list((folder / "training").iterdir()) and not list((folder / "work").iterdir())
    costs = result.costs.set_index("defense")
    assert costs.loc["casa", "training_steps"] == 2 and costs.loc["casa", "training_seconds"] > 0
    assert costs.loc["casa", "trained_parameters"] > 0 == costs.loc["coca", "trained_parameters"]
    assert costs.loc["coca", "forwards_per_token"] == 2
    assert pd.isna(costs.loc["none", "relative_seconds"]) and costs.loc["coca", "relative_seconds"] > 0
    scored = result.replies.groupby("defense")["gate_score"].count()
    assert scored.to_dict() == {"none": 0, "coca": 0, "casa": 12, "casa + safety prompt": 12}


def test_what_is_there_is_not_computed_again(
    omni: Omni, filled: tuple[Path, GridResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = filled

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished row needs no defence")

    with monkeypatch.context() as patch:
        patch.setattr(grid_module, "load_defense", refuse)
        again = make(folder, omni, rounds=1).fill()
    assert (again.computed, again.reused) == (0, 16)
    pd.testing.assert_frame_equal(again.replies, first.replies)
    pd.testing.assert_frame_equal(again.costs, first.costs)
    loaded: list[str] = []

    def told(name: str, *rest: Any, **named: Any) -> Any:
        loaded.append(name)
        return load_defense(name, *rest, **named)

    monkeypatch.setattr(grid_module, "load_defense", told)
    more = make(folder, omni, (*NAMES, "safety-prompt"), rounds=1).fill()
    assert (more.computed, more.reused) == (4, 16) and loaded == ["safety-prompt"]


@pytest.mark.parametrize(
    "change",
    [{"n": 2}, {"generation": GenerationSettings(max_new_tokens=2, batch_size=8)}, {"seeds": (1,)}],
    ids=lambda change: next(iter(change)),
)
def test_what_determines_a_cell_is_in_its_hash(
    omni: Omni, filled: tuple[Path, GridResult], change: dict[str, Any]
) -> None:
    folder, _ = filled
    seeds = change.pop("seeds", None)
    grid = make(folder, omni, ("none",), **change)
    if seeds:
        grid.seeds = seeds
    assert grid.fill().reused == 0


def test_other_training_is_another_row(omni: Omni, filled: tuple[Path, GridResult]) -> None:
    folder, _ = filled
    weights = make(folder, omni).weights
    key = weights.key(system_named("casa"), 0, omni)
    assert key == weights.key(system_named("casa+safety-prompt"), 0, omni)
    for other in (
        ComparedSystem(defense="casa", training={"rule": "scale"}),
        ComparedSystem(defense="casa", examples=8),
        ComparedSystem(defense="ssft-token"),
    ):
        assert weights.key(other, 0, omni) != key
    assert weights.key(system_named("casa"), 1, omni) != key
    tokens = ComparedSystem(defense="ssft-token"), ComparedSystem(defense="refusal-token")
    assert weights.key(tokens[0], 0, omni) == weights.key(tokens[1], 0, omni)


def test_a_killed_grid_goes_on_where_it_was(
    random_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    omni = load_omni(str(random_organism))
    calls = 0

    def dies(self: Omni, queries: Any, *rest: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return generate(self, queries, *rest, **named)

    generate = Omni.generate
    with monkeypatch.context() as patch:
        patch.setattr(Omni, "generate", dies)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "grid", omni, ("none",)).fill()
    result = make(tmp_path / "grid", omni, ("none",)).fill()
    assert (result.computed, result.reused) == (2, 2)


def test_a_killed_training_goes_on(
    random_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from casa_mech.casa.trainer import Trainer

    omni = load_omni(str(random_organism))
    plan = TrainingPlan(16, {"max_steps": 3, "batch_size": 4, "checkpoint_every": 1})
    update = Trainer._update
    steps: list[int] = []

    def dies(self: Trainer, sums: Any) -> Any:
        if len(steps) == 2:
            steps.append(0)
            raise KeyboardInterrupt
        steps.append(1)
        return update(self, sums)

    monkeypatch.setattr(Trainer, "_update", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "grid", omni, ("casa",), plan=plan).fill()
    assert not hasattr(omni.model, "peft_config")
    result = make(tmp_path / "grid", omni, ("casa",), plan=plan).fill()
    assert result.computed == 4 and sum(steps) == 3  # two steps before the stop, one after it


def test_twins_differ_in_their_topic_alone(omni: Omni) -> None:
    sets = WorldSets(("image", "prefill-2"), 6)
    for attack in ("image", "prefill-2"):
        harmful, benign = (sets.queries(Cell(attack, label), 3, omni) for label in ("harmful", "benign"))
        for one, other in zip(harmful, benign, strict=True):
            assert one.meta["pair"] == other.meta["pair"]
            assert {key: one.meta[key] for key in ("verb", "template", "attack")} == {
                key: other.meta[key] for key in ("verb", "template", "attack")
            }
            assert (one.label, other.label) == ("harmful", "benign")
    train = {example.query.text for example in PLAN.examples(3)}
    assert not train & {query.text for query in sets.queries(Cell("prefill-2", "harmful"), 3, omni)}


def test_tables_of_a_grid(filled: tuple[Path, GridResult]) -> None:
    _, result = filled
    rows = grid_rows(result)
    assert tuple(rows.columns) == RESULT_COLUMNS
    metrics = {
        "attack_success",
        "over_refusal",
        "benign_answered",
        "gate_auroc",
        "forwards_per_token",
        "training_seconds",
    }
    assert metrics <= set(rows["metric"])
    assert set(rows[rows["metric"] == "gate_auroc"]["defense"]) == {"casa", "casa + safety prompt"}
    table = compact(summarise(result))
    assert list(table["defense"]) == ["none", "casa", "casa + safety prompt", "coca"]
    assert {"text", "image"} <= set(table.columns)


def test_given_weights_are_used(omni: Omni, filled: tuple[Path, GridResult], tmp_path: Path) -> None:
    folder, first = filled
    (trained,) = (folder / "trained").iterdir()
    grid = make(tmp_path / "other", omni, ("none",))
    grid.systems = [ComparedSystem(defense="casa", path=str(trained))]
    replies = grid.fill().replies
    own = first.replies[first.replies["defense"] == "casa"]
    assert list(replies["reply"]) == list(own["reply"]) and training_cost(trained)[1] == 2
    grid.systems = [ComparedSystem(defense="casa", path=str(tmp_path / "seed{seed}"))]
    with pytest.raises(InputError, match="seed0 with trained weights"):
        grid.fill()


def test_a_table_of_examples_is_cut_by_class(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i}", "reply": "r", "label": "harmful" if i < 4 else "benign"} for i in range(20)]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    plan = TrainingPlan(0, {}, ExampleTable(path=tmp_path / "t.csv"))
    assert len(plan.examples(0)) == 20
    assert [example.query.label for example in plan.examples(0, 6)] == ["harmful"] * 3 + ["benign"] * 3
    with pytest.raises(InputError, match=r"needs 5 harmful examples; the training set has 4"):
        plan.examples(0, 10)


def test_bad_rows_are_named(omni: Omni, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown defense 'cas'; defenses: none, safety-prompt, .*\+safety-prompt"):
        system_named("cas")
    with pytest.raises(InputError, match=r"casa\+prompt"):
        system_named("casa+prompt")
    with pytest.raises(InputError, match="no option 'alfa'; its options: alpha, base, principle"):
        ComparedSystem(defense="coca", options={"alfa": 1})
    with pytest.raises(InputError, match="no option 'rul'"):
        ComparedSystem(defense="casa", training={"rul": "scale"})
    with pytest.raises(InputError, match="not trained: leave out"):
        ComparedSystem(defense="coca", path="x")
    with pytest.raises(InputError, match="two rows are called 'casa'"):
        make(tmp_path / "a", omni, ("casa", "casa"))
    with pytest.raises(InputError, match="unknown attack 'picture'; attacks: plain"):
        WorldSets(("picture",))
    with pytest.raises(InputError, match="named twice"):
        WorldSets(("plain", "plain"))
    with pytest.raises(InputError, match="different whole numbers"):
        Grid(omni, [ComparedSystem(defense="none")], WorldSets(("plain",), 1), (0, 0), open_folder(tmp_path / "b"),
             Weights(PLAN, open_folder(tmp_path / "b")))  # fmt: skip
    assert [system_named(name).label for name in DEFAULT_DEFENSES][-9:] == [
        "casa", "casa + safety prompt", "casa-scale", "casa-scale-replace", "coca", "safecode", "safecode-code",
        "moras", "any-depth",
    ]  # fmt: skip


def test_moras_is_refused_before_anything_runs(tiny_omni: Omni, tmp_path: Path) -> None:
    tiny_omni.model.config.micro_world = False
    with pytest.raises(InputError, match="options prototypes and calibration"):
        make(tmp_path / "grid", tiny_omni, ("none", "moras"))


def test_a_full_disk_is_one_line_and_the_same_grid_goes_on(omni: Omni, tmp_path: Path) -> None:
    with files_of_at_most(20_000), pytest.raises(RunError) as caught:
        make(tmp_path / "grid", omni, ("none", "ssft")).fill()
    assert "cannot write" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob(f"{TEMPORARY}*"))
    assert not hasattr(omni.model, "peft_config")
    result = make(tmp_path / "grid", omni, ("none", "ssft")).fill()
    assert (result.computed, result.reused) == (4, 4)


def test_a_prompt_beyond_the_models_positions_stops_the_grid_first(
    omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = make(tmp_path / "grid", omni, ("none",))
    long = Query.from_text("cake " * 5_000, id="long")
    monkeypatch.setattr(WorldSets, "queries", lambda self, cell, seed, omni: [long])
    monkeypatch.setattr(Omni, "write", lambda *_: pytest.fail("a reply was generated"))
    with pytest.raises(InputError, match=r"query long: its prompt has 5,0\d\d tokens"):
        grid.fill()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunError, match=r"other files \(mine.txt"):
        open_folder(tmp_path)
    (tmp_path / "compare.json").write_text("no json")
    with pytest.raises(RunError, match=r"other files \(mine.txt"):  # it may be anybody's compare.json
        open_folder(tmp_path)
    (tmp_path / "compare.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(RunError, match="schema version 9"):
        open_folder(tmp_path)


def test_benign_data_are_a_choice_of_the_plan_and_of_a_row(tmp_path: Path) -> None:
    plan = TrainingPlan(40)
    plain, varied = plan.examples(0), replace(plan, benign="varied").examples(0)
    assert plan.examples(0, benign="varied") == varied != plain
    assert [row for row in varied if row.query.label == "harmful"] == [
        row for row in plain if row.query.label == "harmful"
    ]
    row = ComparedSystem(defense="casa", benign="varied")
    assert Weights(plan, open_folder(tmp_path))._training_set(row, 0) == varied
    with pytest.raises(InputError, match="benign must be one of plain, varied, not 'mixed'"):
        replace(plan, benign="mixed")
    with pytest.raises(InputError, match="benign varied is for the micro-world's examples"):
        TrainingPlan(0, {}, ExampleTable(path=tmp_path / "t.csv"), benign="varied")
    with pytest.raises(InputError, match="defense 'coca' is not trained: leave out training, examples, benign and"):
        ComparedSystem(defense="coca", benign="varied")


def test_casa_mended_and_single_options_are_rows(omni: Omni, tmp_path: Path) -> None:
    """The options at inference share one training; the preset has its own."""
    rows = [
        ComparedSystem(defense="casa"),
        ComparedSystem(defense="casa", name="re-centred", options={"recentre": True, "n_calibration": 2}),
        ComparedSystem(defense="casa-mended", benign="varied"),
    ]
    assert [row.calibrates for row in rows] == [False, True, True]
    grid = make(tmp_path / "grid", omni, ("none",))
    grid.systems = rows
    keys = [grid.weights.key(row, 0, omni) for row in rows]
    assert keys[0] == keys[1] != keys[2] and keys[2]["records"][0]["counterfactual"] > 0
    replies = grid.fill().replies
    assert set(replies["defense"]) == {"casa", "re-centred", "casa-mended"}
    scores = {
        row: replies[(replies["defense"] == row) & (replies["attack"] == "image")]["v_s"]
        for row in ("casa", "re-centred")
    }
    assert scores["casa"].tolist() != pytest.approx(scores["re-centred"].tolist(), abs=1e-6)
    assert not hasattr(omni.model, "peft_config")


def test_a_row_without_calibration_queries_is_refused_before_anything_runs(tiny_omni: Omni, tmp_path: Path) -> None:
    tiny_omni.model.config.micro_world = False
    with pytest.raises(InputError, match="'casa-mended' needs queries to be calibrated on: set its option calibration"):
        make(tmp_path / "grid", tiny_omni, ("none", "casa-mended"))


def test_a_failed_training_is_counted_and_kept(omni: Omni, tmp_path: Path) -> None:
    """Two steps do not move L_rr from 1: the seed has failed, and its replies are in the table all the same."""
    result = make(tmp_path / "grid", omni, ("none", "circuit-breaker"), n=2).fill()
    failed = result.costs.set_index("defense")["training_failed"]
    assert failed["circuit-breaker"] == 1 and pd.isna(failed["none"])
    table = summarise(result)
    row = table[(table["defense"] == "circuit-breaker") & (table["metric"] == "training_failed")]
    assert row["value"].tolist() == [1.0] and row["seeds"].tolist() == [1]
    assert compact(table).set_index("defense")["failed trainings"].to_dict() == {
        "none": "–", "circuit-breaker": "1 of 1",
    }  # fmt: skip
    assert (table["defense"] == "circuit-breaker").sum() > (table["defense"] == "none").sum()
