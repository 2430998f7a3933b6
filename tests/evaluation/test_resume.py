"""Runs that are stopped in the middle, replies that are judged again, and the `casa-mech judge` command."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from helpers.command import run
from helpers.judge_server import Step, openai, serving
from PIL import Image

from casa_mech.casa import Casa
from casa_mech.errors import RunError
from casa_mech.evaluation import evaluate as evaluation
from casa_mech.evaluation.evaluate import evaluate, read_evaluation, save_evaluation
from casa_mech.evaluation.reply_parts import ReplyParts
from casa_mech.identity import query_digest
from casa_mech.judging import KeywordJudge, read_table
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.organism.world import default_world
from casa_mech.queries import AudioPart, ImagePart, Query, TextPart

SETTINGS = GenerationSettings(max_new_tokens=2, batch_size=2)
VOLATILE = ["seconds"]


@pytest.fixture
def queries() -> list[Query]:
    return default_world().requests(21, 0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "LEAST_A_PART", 4)
    monkeypatch.setattr(evaluation, "BATCHES_A_PART", 2)


class Stopping:
    """`omni.generate` that is stopped at the given call, and counts the queries that it answered."""

    def __init__(self, omni: Omni, monkeypatch: pytest.MonkeyPatch, at: int = -1) -> None:
        self.calls, self.answered, self.at, self.real = 0, 0, at, omni.generate
        monkeypatch.setattr(omni, "generate", self)

    def __call__(self, group, *arguments, **options):  # type: ignore[no-untyped-def]
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.answered += len(group)
        return self.real(group, *arguments, **options)


def same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(first.drop(columns=VOLATILE), second.drop(columns=VOLATILE))


def test_a_run_that_is_stopped_goes_on_where_it_was(
    tiny_omni: Omni, queries: list[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tiny_omni, None, queries, settings=SETTINGS)
    with monkeypatch.context() as patch:
        stopped = Stopping(tiny_omni, patch, at=4)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tiny_omni, None, queries, settings=SETTINGS, store=tmp_path)
    assert stopped.answered == 12 and len(list((tmp_path / "parts").glob("part-*.parquet"))) == 3
    (tmp_path / "parts" / ".writing-part-x.parquet").write_bytes(b"killed here")
    with monkeypatch.context() as patch:
        rest = Stopping(tiny_omni, patch)
        found = evaluate(tiny_omni, None, queries, settings=SETTINGS, store=tmp_path)
    assert rest.answered == 21 - 12
    same(found.replies, whole.replies)
    assert [row["value"] for row in found.rows] == [row["value"] for row in whole.rows]
    with monkeypatch.context() as patch:
        again = Stopping(tiny_omni, patch)
        evaluate(tiny_omni, None, [*queries, Query.from_text("make tea", id="new")], KeywordJudge(), settings=SETTINGS,
                 store=tmp_path)  # fmt: skip
    assert again.answered == 1, "another judge and one more query: one reply to generate"


def test_other_weights_settings_and_words_are_generated_anew(
    tiny_omni: Omni, queries: list[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Stopping(tiny_omni, monkeypatch)

    def answered(asked: list[Query], settings: GenerationSettings = SETTINGS, casa: Casa | None = None) -> int:
        before = counted.answered
        evaluate(tiny_omni, casa, asked, settings=settings, store=tmp_path)
        return counted.answered - before

    assert answered(queries[:4]) == 4 and answered(queries[:4]) == 0
    assert answered(queries[:4], SETTINGS.model_copy(update={"max_new_tokens": 3})) == 4
    assert answered([queries[0].model_copy(update={"system": "be kind"})]) == 1
    tiny_omni.head.weight.data[0, 0] += 1
    assert answered(queries[:4]) == 4
    casa = Casa.attach(tiny_omni)
    first = evaluate(tiny_omni, casa, queries[:4], settings=SETTINGS, store=tmp_path)
    assert first.replies["v_s"].notna().all()
    second = evaluate(tiny_omni, casa, queries[:4], settings=SETTINGS, store=tmp_path)
    pd.testing.assert_frame_equal(first.replies, second.replies)
    casa.parts.tokens.rows.state_dict()["embedding" if "embedding" in casa.parts.tokens.rows.state_dict() else
                                        next(iter(casa.parts.tokens.rows.state_dict()))].add_(1)  # fmt: skip
    third = evaluate(tiny_omni, casa, queries[:4], settings=SETTINGS, store=tmp_path)
    assert list(third.replies["seconds"]) != list(first.replies["seconds"]), "trained on: generated anew"


def test_sampled_replies_are_the_same_after_a_stop(
    tiny_omni: Omni, queries: list[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = SETTINGS.model_copy(update={"do_sample": True, "seed": 5})
    whole = evaluate(tiny_omni, None, queries, settings=sampled, store=tmp_path / "whole")
    with monkeypatch.context() as patch:
        Stopping(tiny_omni, patch, at=3)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tiny_omni, None, queries, settings=sampled, store=tmp_path / "cut")
    same(evaluate(tiny_omni, None, queries, settings=sampled, store=tmp_path / "cut").replies, whole.replies)


def test_media_count_by_their_content(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "white")
    picture.save(tmp_path / "a.png")
    clip = np.zeros(100, np.float32)

    def digest(*parts: object, **fields: object) -> str:
        return query_digest(Query(id="q", parts=parts, **fields))  # type: ignore[arg-type]

    text = TextPart(text="x")
    different = [
        digest(text),
        digest(text, prefill="sure"),
        digest(text, system="s"),
        digest(ImagePart(image=picture), text),
        digest(ImagePart(image=np.asarray(picture) - 1), text),
        digest(ImagePart(image=tmp_path / "a.png"), text),
        digest(AudioPart(audio=clip, rate=16_000)),
        digest(AudioPart(audio=clip, rate=8_000)),
    ]
    assert len(set(different)) == len(different)
    assert digest(ImagePart(image=picture)) == digest(ImagePart(image=np.asarray(picture)))
    Image.new("RGB", (8, 8), "black").save(tmp_path / "a.png")
    assert digest(ImagePart(image=tmp_path / "a.png"), text) not in different


def test_damaged_and_busy_parts_are_named(tiny_omni: Omni, queries: list[Query], tmp_path: Path) -> None:
    evaluate(tiny_omni, None, queries[:4], settings=SETTINGS, store=tmp_path)
    (part,) = (tmp_path / "parts").glob("part-*")
    content = part.read_bytes()
    part.write_bytes(content[:100])
    with pytest.raises(RunError, match=r"part-.*\.parquet is damaged .*: remove it"):
        ReplyParts(tmp_path / "parts", {})
    part.write_bytes(content)
    with FileLock(tmp_path / "parts" / ".lock"), pytest.raises(RunError, match="in use by another run"):
        evaluate(tiny_omni, None, queries, settings=SETTINGS, store=tmp_path)


def test_verdicts_stand_beside_replies_in_their_own_table(
    tiny_omni: Omni, queries: list[Query], tmp_path: Path
) -> None:
    found = evaluate(tiny_omni, None, queries[:5], settings=SETTINGS)
    save_evaluation(found, tmp_path)
    replies, verdicts = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("replies", "verdicts"))
    assert "outcome" not in replies and list(verdicts["row"]) == [0, 1, 2, 3, 4]
    assert set(verdicts["judge"]) == {"micro-world"} and verdicts["reason"].str.len().gt(0).all()
    pd.testing.assert_frame_equal(read_evaluation(tmp_path), found.replies, check_dtype=False)
    # A folder of an older version lacks the raw pair.
    replies.drop(columns=["raw_logit_safe", "raw_logit_unsafe"]).to_parquet(tmp_path / "replies.parquet")
    assert read_evaluation(tmp_path)[["raw_logit_safe", "raw_logit_unsafe"]].isna().all(axis=None)
    verdicts.iloc[::-1].to_parquet(tmp_path / "verdicts.parquet")
    with pytest.raises(RunError, match="does not belong to"):
        read_evaluation(tmp_path)
    (tmp_path / "verdicts.parquet").unlink()
    with pytest.raises(RunError, match=r"verdicts\.parquet cannot be read"):
        read_evaluation(tmp_path)


def test_stored_replies_are_judged_again_without_a_model(
    tiny_omni: Omni, queries: list[Query], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = evaluate(tiny_omni, None, queries, settings=SETTINGS)
    save_evaluation(found, tmp_path / "run")
    monkeypatch.setattr(Omni, "generate", lambda *_, **__: pytest.fail("generated"))
    shared = ["judge", "run", "--judge", "micro-world", "--json"]
    for source in (tmp_path / "run", tmp_path / "run" / "replies.csv"):
        out = tmp_path / f"again-{source.name}"
        code, printed, err = run(capsys, *shared, "--replies", source, "--out", out)
        summary = json.loads(printed)
        assert code == 0, err
        assert summary["replies"] == 21 and summary["undecided"] == 0
        verdicts = pd.read_parquet(out / "verdicts.parquet")
        assert list(verdicts["outcome"]) == list(found.replies["outcome"]), "the same judge says the same"
        table = read_table(out / "results.parquet")
        expected = {(row["metric"], row["label"]): row["value"] for row in found.rows}
        assert {(row.metric, row.label): row.value for row in table.itertuples()} == pytest.approx(expected)
    before = summary["asked"]
    code, printed, _ = run(capsys, *shared, "--replies", tmp_path / "run", "--out", out)
    assert code == 0 and json.loads(printed)["asked"] == 0 < before


def test_a_killed_evaluation_goes_on_where_it_was(
    random_organism: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.csv").write_text("goal\n" + "".join(f"how do i make a cake {'please ' * i}\n" for i in range(10)))
    command = [
        "evaluate", "--model", random_organism, "--queries", tmp_path / "t.csv", "--column", "goal", "--label",
        "benign", "--max-new-tokens", "2", "--batch-size", "2", "--json", "--out",
    ]  # fmt: skip
    real, answered, stop = Omni.generate, [0], [3]

    def generate(self, group, *arguments, **options):  # type: ignore[no-untyped-def]
        stop[0] -= 1
        if stop[0] == 0:
            raise KeyboardInterrupt
        answered[0] += len(group)
        return real(self, group, *arguments, **options)

    monkeypatch.setattr(Omni, "generate", generate)
    code, out, err = run(capsys, *command, tmp_path / "out")
    assert (code, out) == (130, "") and "the same command continues from there" in err and answered[0] == 8
    (tmp_path / "out" / ".writing-abcreplies.parquet").write_bytes(b"killed here")
    code, out, err = run(capsys, *command, tmp_path / "out")
    assert code == 0 and json.loads(out)["queries"] == 10 and answered[0] == 10, err
    code, _, _ = run(capsys, *command, tmp_path / "other")
    assert code == 0 and answered[0] == 20
    same(*(pd.read_parquet(tmp_path / name / "replies.parquet") for name in ("out", "other")))
    code, _, _ = run(capsys, *command, tmp_path / "out", "--defense", "safety-prompt")
    assert code == 0 and answered[0] == 30, "another defence's replies are its own"


def test_a_judge_that_goes_down_is_one_line_and_the_same_command_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = tmp_path / "mine.csv"
    pd.DataFrame({"goal": [f"do {i}" for i in range(6)], "answer": ["done"] * 6, "label": ["harmful"] * 6}).to_csv(path)
    down = [True]

    def answer(number: int, _: object) -> Step:
        if number >= 3 and down[0]:
            return Step(status=500, body=b"sk-secret-key")
        return Step(body=openai("VERDICT: YES" if number != 1 else "hm"))

    with serving(answer) as server:
        command = [
            "judge", "run", "--replies", path, "--judge", "yes-no", "--backend", "openai", "--judge-model", "m",
            "--base-url", server.url, "--key-env", "JUDGE_KEY", "--prompt-column", "goal", "--reply-column", "answer",
            "--out", tmp_path / "out", "--tries", "1", "--concurrency", "1", "--input-price", "1", "--output-price",
            "2", "--json",
        ]  # fmt: skip
        code, out, err = run(capsys, *command)
        last = err.strip().splitlines()[-1]
        assert code == 2 and out == "" and "the judge m at" in last and "3 of 6 replies are not judged" in last
        assert "continues from" in last and "sk-secret-key" not in err
        down[0] = False
        code, out, err = run(capsys, *command)
    summary = json.loads(out)
    assert code == 0 and summary["asked"] == 3 and summary["undecided"] == 1
    assert summary["outcomes"] == {"complied": 5, "undecided": 1}
    assert summary["input_tokens"] == 60 and summary["cost_dollars"] == pytest.approx((3 * 10 + 3 * 3 * 2) / 1e6)
    rates = {row["metric"]: row["value"] for row in summary["results"]}
    assert rates == {"attack_success": 1, "refused": 0, "undecided": 1 / 6, "attack_success_upper": 1, "judge_score": 1}
    for file in (tmp_path / "out").iterdir():
        assert b"sk-secret-key" not in file.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompt-column", "goal"], "no column 'goal'; it has prompt, reply"),
        (["--out", "."], "holds other files"),
        (["--judge", "oracle"], "unknown judge"),
        (["--replies", "gone.csv"], "gone.csv"),
        (["--judge", "micro-world"], "use KeywordJudge"),
        (
            ["--judge", "yes-no", "--backend", "openai", "--judge-model", "m", "--key-env", "NOT_SET_HERE"],
            "NOT_SET_HERE",
        ),
    ],
)
def test_mistakes_are_one_line(
    change: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("prompt,reply\nbake,flour\n")
    options = {"--replies": "t.csv", "--judge": "keyword", "--out": "out"}
    options |= dict(zip(change[::2], change[1::2], strict=True))
    code, out, err = run(capsys, "judge", "run", *[word for pair in options.items() for word in pair])
    lines = [line for line in err.strip().splitlines() if line.startswith("casa-mech:")]
    assert (code, out) == (2, "") and len(lines) == 1 and message in lines[0]
    assert not Path("out/results.parquet").exists()


def test_agreement_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labels.csv"
    rows = {"outcome": ["complied", "refused"] * 10, "ann": ["complied", "refused"] * 9 + ["refused", "refused"]}
    pd.DataFrame({**rows, "topic": [f"t{i // 2}" for i in range(20)]}).to_csv(path, index=False)
    code, out, err = run(capsys, "judge", "agreement", path, "--human", "ann", "--cluster", "topic", "--json")
    found = json.loads(out)
    assert code == 0, err
    assert [row["measure"] for row in found["measures"]] == ["observed", "cohen_kappa", "krippendorff_alpha"]
    assert found["measures"][0]["value"] == 0.95 and found["confusion"][0]["n"] == 9
    code, out, _ = run(capsys, "judge", "agreement", path, "--human", "ann")
    assert code == 0 and "cohen_kappa" in out
    for arguments in (["--human", "bob"], ["--human", "ann", "--cluster", "x"], ["--human", "ann", "--level", "odd"]):
        code, out, err = run(capsys, "judge", "agreement", path, *arguments)
        assert (code, out) == (2, "") and len(err.strip().splitlines()) == 1
    for command in ("run", "agreement"):
        code, out, _ = run(capsys, "judge", command, "--help")
        assert code == 0 and "Example:" in out
