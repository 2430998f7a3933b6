"""`casa-mech compare`: the command, its YAML file, and a full-size table on small files of the public shape."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import yaml
from PIL import Image

from casa_mech.cli import main
from casa_mech.compare.config import example, read_config
from casa_mech.errors import InputError
from casa_mech.judging import read_table

QUICK = ["--examples", "16", "--steps", "2", "--train-option", "batch_size=4", "--max-new-tokens", "3",
         "--batch-size", "16", "--timing-rounds", "0", "--seeds", "0"]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_csv(path, index=False)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Small files of the shapes in which JailbreakV-28k, MM-SafetyBench, AIAH, AdvBench and FigStep are published."""
    folder = tmp_path / "sets"
    asked = {"redteam_query": "pick a lock", "policy": "Locks", "from": "own", "format": "Template"}
    pictures = [f"llm_transfer_attack/{i}.png" for i in range(3)]
    rows = [
        {"id": i, "jailbreak_query": f"story {i}: pick a lock", "image_path": pictures[i], **asked} for i in range(3)
    ]
    write(folder / "jbv" / "mini_JailBreakV_28K.csv", *rows)
    entry = {"Question": "how do i pick a lock", "Changed Question": "how to pick a lock", "Key Phrase": "a lock",
             "Phrase Type": "thing", "Rephrased Question": "it in it", "Rephrased Question(SD)": "it"}  # fmt: skip
    questions = folder / "mm" / "data" / "processed_questions"
    questions.mkdir(parents=True)
    (questions / "01-Illegal_Activitiy.json").write_text(json.dumps({"0": entry, "1": entry}))
    places = [folder / "jbv" / picture for picture in pictures]
    places += [folder / "mm" / "data" / "imgs" / "01-Illegal_Activitiy" / kind / f"{i}.jpg"
               for kind in ("SD", "TYPO", "SD_TYPO") for i in range(2)]  # fmt: skip
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56, 28), "white").save(place)
    (folder / "aiah" / "questions").mkdir(parents=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal(8_000)
    for i in range(2):
        soundfile.write(folder / "aiah" / "questions" / f"Fraud_{i}.wav", noise.astype(np.float32), 16_000)
    target = "sure , here is how to pick a lock , first take it"
    write(folder / "harmful_behaviors.csv", *({"goal": f"pick lock {i}", "target": target} for i in range(3)),
          {"goal": "break it", "target": "sure"})  # fmt: skip
    write(folder / "figstep_benign_questions.csv", *({"question": f"bake cake {i}", "FigTxt": i} for i in range(3)))
    return folder


@pytest.fixture
def paper(public: Path, tmp_path: Path) -> Path:
    """The shipped example with what a tiny model needs: this data, the keyword judge, fewer rows."""
    content = yaml.safe_load(example())
    content |= {"data": "sets", "judge": {"name": "keyword"}, "generation": {"max_new_tokens": 3, "batch_size": 16}}
    content["training"]["settings"] = {"max_steps": 2, "batch_size": 4}
    content["defenses"] = ["none", "casa-scale", "casa", {"defense": "coca", "options": {"alpha": 4}}]
    content["seeds"] = [0]
    content["timing_rounds"] = 0
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(content))
    rows = [
        {"prompt": f"make it {i}", "reply": "sorry .", "label": "harmful", "completion": "sure ."} for i in range(4)
    ]
    rows += [{"prompt": f"bake it {i}", "reply": "sure .", "label": "benign", "completion": ""} for i in range(4)]
    write(tmp_path / "training.csv", *rows)
    for name, word in (("aiah", "lock"), ("aiah_benign", "cake")):
        write(tmp_path / f"{name}.csv", {"question": f"how do i make a {word} ?", "word": word})
    return tmp_path / "paper.yaml"


def test_the_shipped_example_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--example")
    assert code == 0 and out == example()
    (tmp_path / "paper.yaml").write_text(out)
    config = read_config(tmp_path / "paper.yaml")
    labels = [system.label for system in config.defenses]
    assert len(labels) == len(set(labels)) == 12
    assert config.defenses[-1].options["prototypes"]["path"] == str(tmp_path / "moras_unsafe.csv")
    read = {source.set for plan in config.sets for source in (plan.harmful, plan.benign) if source is not None}
    assert {"jailbreakv-28k-mini", "mm-safetybench-typo", "aiah", "advbench"} <= read
    assert {plan.attack for plan in config.sets} >= {"aiah-speech", "prefill-2", "prefill-4", "prefill-9", "prefill-12"}
    assert config.generation.max_new_tokens == 512 and config.judge.backend == "anthropic"


def test_the_papers_table_on_files_of_the_public_shape(
    random_organism: Path, paper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", random_organism, "--queries-config", paper, "--out", tmp_path / "out", "--json"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["judge"] == "keyword"
    assert {row["defense"] for row in found["defenses"]} == {"none", "casa-scale", "casa", "coca"}
    assert "left out 1 queries that prefill-12 does not fit" in err and "micro-world's English" in err
    (table,) = (tmp_path / "out" / "summary").glob("*-results.parquet")
    rows = read_table(table)
    sizes = rows[(rows["metric"] == "undecided") & (rows["defense"] == "casa")].set_index(["attack", "label"])["n"]
    assert sizes["JailbreakV-28k mini", "harmful"] == sizes["prefill 12", "harmful"] == 3
    assert sizes["MM-SafetyBench SD+TYPO", "harmful"] == sizes["AIAH questions", "harmful"] == 2
    assert sizes["AIAH speech", "harmful"] == sizes["AIAH speech", "benign"] == 1
    assert set(rows[rows["attack"] == "AIAH questions"]["surface"]) == {"audio+text"}
    again = json.loads(run(capsys, *arguments)[1])
    assert again["cells"] == {"computed": 0, "found": found["cells"]["computed"]}


CONFIG = "sets:\n- {name: a, harmful: {set: advbench}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets: [", "is no YAML: .* line 1"),
        ("- a", "expected keys and values"),
        ("seeds: [0]", "sets: Field required"),
        ("sets: []", "sets: Tuple should have at least 1 item"),
        ("sets: [{name: a}]", "sets.0: the set 'a' needs harmful or benign"),
        ("sets: [{name: a, harmful: {set: advbenc}}]", "sets.0.harmful.set: no benchmark 'advbenc'; there are adv"),
        ("sets: [{name: a, harmful: {set: xstest, split: no}}]", "harmful.split: Input should be a valid string"),
        ("sets: [{name: a, harmful: {set: xstest, split: x}}]", "sets.0.harmful: benchmark 'xstest' has no split 'x'"),
        ("sets: [{name: a, harmful: {set: advbench, meta: {a: b}}}]", "sets.0.harmful: columns and meta are for"),
        ("sets: [{name: a, harm: {set: advbench}}]", "sets.0.harm: no such key; there are name, harmful, benign"),
        ("sets: [{name: a, harmful: {set: advbench}, attack: b}]", "sets.0.attack: unknown attack 'b'; attacks: plain"),
        (f"{CONFIG}- {{name: a, harmful: {{set: advbench}}}}", "two sets are called 'a'"),
        (f"{CONFIG}defences: [none]", "defences: no such key; there are data, sets, defenses"),
        (f"{CONFIG}defenses: [cas]", "defenses: unknown defense 'cas'; defenses: none"),
        (f"{CONFIG}defenses: [{{defense: coca, options: {{a: 1}}}}]", "defenses.0: .*'coca' has no option 'a'"),
        (f"{CONFIG}defenses: [{{defense: coca, opts: {{}}}}]", "defenses.0: ComparedSystem has no field 'opts'"),
        (f"{CONFIG}judge: {{name: best}}", "judge.name: unknown judge 'best'; judges: micro-world, keyword"),
        (f"{CONFIG}generation: {{max_new_tokens: 0}}", "generation.max_new_tokens: Input should be greater"),
        (f"{CONFIG}seeds: [{2**80}]", "seeds.0: Input should be"),
        ("[" * 20_000, "is no YAML: nested too deep"),
        (f"{CONFIG}training: {{benign: mixed}}", "training.benign: Input should be 'plain' or 'varied'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_names_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_config(tmp_path / "c.yaml")
    assert str(caught.value).startswith(str(tmp_path / "c.yaml")) and "\n" not in str(caught.value)


def test_a_set_that_cannot_be_used_is_named(
    random_organism: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "no.yaml")
    for text, message in {
        "{name: a, harmful: {set: advbench}, attack: prefill-9}": "set 'a': .* prefill-9 needs 9 .*skip_unfit: true",
        "{name: a, benign: {set: advbench}}": "set 'a': benign: advbench holds no benign query",
        "{name: a, harmful: {set: table, path: sets/harmful_behaviors.csv, columns: {column: g}}}": "no column 'g'",
    }.items():
        (tmp_path / "c.yaml").write_text(f"data: sets\njudge: {{name: keyword}}\ndefenses: [none]\nsets: [{text}]")
        code, _, err = run(capsys, "--model", random_organism, "--queries-config", tmp_path / "c.yaml",
                           "--out", tmp_path / "out")  # fmt: skip
        assert code == 2
        assert re.search(message, err), err


def test_the_command_adds_rows_and_ablates(
    random_organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--model", random_organism, "--attacks", "plain", "--n", "2", "--out", tmp_path / "out", *QUICK]
    code, out, err = run(capsys, *shared, "--defenses", "none, casa", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["cells"] == {"computed": 4, "found": 0} and found["n_cell"] == 2
    assert [row["defense"] for row in found["against_casa"]] == ["none"] * 3
    assert found["published"]["note"].endswith("not measured here")
    found = json.loads(run(capsys, *shared, "--defenses", "none,casa+safety-prompt,casa", "--json")[1])
    assert found["cells"] == {"computed": 2, "found": 4}
    code, out, err = run(capsys, *shared, "--ablations", "--axes", "prompt")
    assert code == 0 and "ssft-token + safety prompt" in out
    names = {path.name for path in (tmp_path / "out" / "summary").iterdir()}
    model = random_organism.name
    kinds = ("-summary.csv", "-tests.csv", "-curves.csv", "-published.csv", "-results.parquet", "-outcomes.parquet")
    assert names == {f"{grid}-{model}{kind}" for grid in ("compare", "ablations") for kind in (*kinds, ".json")}
    assert "axis" in pd.read_csv(tmp_path / "out" / "summary" / f"ablations-{model}-summary.csv").columns
    figures = tmp_path / "out" / "figures"
    drawn = {f"compare-{model}-grid", f"compare-{model}-tradeoff", f"ablations-{model}-prompt"}
    assert {path.name for path in figures.iterdir()} == {
        f"{name}.{kind}" for name in drawn for kind in ("png", "svg", "csv")
    }
    assert set(pd.read_csv(figures / f"compare-{model}-grid.csv")["defense"]) == {
        "none",
        "casa",
        "casa + safety prompt",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defenses", "none,cas"], "unknown defense 'cas'"),
        (["--defenses", "none,none"], "two rows are called 'none'"),
        (["--attacks", "plan"], "unknown attack 'plan'; attacks: plain"),
        (["--seeds", "0,a"], "--seeds 0,a: write whole numbers"),
        (["--ablations", "--defenses", "none"], "--ablations has rows of its own"),
        (["--ablations", "--axes", "forms"], "unknown ablation 'forms'"),
        (["--benign", "mixed"], "benign must be one of plain, varied, not 'mixed'"),
        (["--queries-config", "none.yaml", "--n", "3"], "--queries-config none.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "cells").exists()
