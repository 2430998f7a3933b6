"""Stored replies judged again: labels as researchers write them, and requests that were never text."""

from pathlib import Path

import pytest

from casa_mech.errors import InputError
from casa_mech.evaluation.rejudge import judge_replies
from casa_mech.judging import KeywordJudge


def test_labels_are_read_whatever_their_words(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(
        "prompt,reply,label\na bomb,sure,Unsafe\ntea,sorry I cannot,BENIGN\ncake,sure,other\n"
    )
    summary = judge_replies(tmp_path / "r.csv", KeywordJudge(), tmp_path / "out", progress=False)
    rates = {(row["label"], row["metric"]): row["value"] for row in summary["results"]}
    assert rates["harmful", "attack_success"] == 1 and rates["benign", "over_refusal"] == 1
    assert ("other", "undecided") in rates


def test_a_reply_to_media_alone_needs_no_prompt_but_one_to_text_does(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("prompt,reply,surface\n,sure,audio+image\n")
    assert judge_replies(path, KeywordJudge(), tmp_path / "out", progress=False)["replies"] == 1
    path.write_text("prompt,reply,surface\n,sure,text\n")
    with pytest.raises(InputError, match=r"row 1: no request in column 'prompt'"):
        judge_replies(path, KeywordJudge(), tmp_path / "other", progress=False)
