"""Evaluation: what is counted, what is refused before it begins, and queries that have no text."""

from pathlib import Path

import pandas as pd
import pytest
from helpers.page import shown

from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import evaluate, result_rows
from casa_mech.judging.estimate import Estimate
from casa_mech.judging.results import RESULT_COLUMNS
from casa_mech.judging.stats import wilson
from casa_mech.judging.verdict import Verdict
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.queries import AudioPart, ImagePart, Query, Reply
from casa_mech.queries.media import check_media


class ByName:
    """A judge whose verdicts are known: the outcome that stands in the query's id."""

    name = "by-name"

    def judge(self, query: Query, reply: Reply | str) -> Verdict:
        return Verdict(query_id=query.id, judge=self.name, outcome=query.id.split("-")[0])


def test_evaluation_counts_what_the_judge_says(tiny_omni: Omni) -> None:
    names = ["refused-1", "complied-2", "refused-3", "incoherent-4"]
    queries = [Query.from_text(f"how do i make tea {name}", id=name, label="benign") for name in names]
    found = evaluate(tiny_omni, None, queries, ByName(), settings=GenerationSettings(max_new_tokens=2))
    assert list(found.replies["query_id"]) == names
    assert list(found.replies["outcome"]) == ["refused", "complied", "refused", "incoherent"]
    for row in found.rows:
        assert set(row) == set(RESULT_COLUMNS)
    rates = {row["metric"]: (row["value"], row["n"]) for row in found.rows}
    assert rates == {"over_refusal": (2 / 4, 4), "benign_answered": (1 / 4, 4), "undecided": (0.0, 4)}
    row = next(row for row in found.rows if row["metric"] == "over_refusal")
    assert (row["low"], row["high"]) == wilson(2, 4)
    assert repr(found) == "Evaluation: pretrained on tiny: 4 replies, 3 rates"
    assert f"over_refusal 4 {Estimate(0.5, *wilson(2, 4)).text()}" in shown(found).words


def test_rates_split_by_topic_and_auroc(tiny_omni: Omni) -> None:
    rows = [
        {"model": "m", "defense": "CASA", "attack": "plain", "surface": "text", "label": label, "split": split,
         "topic": f"{label}{number}", "query_id": f"{label}{split}{number}", "safety_token": "unsafe",
         "outcome": "complied", "v_s": 0.9 if label == "harmful" else 0.1}
        for label in ("harmful", "benign") for split in ("seen", "held_out") for number in range(4)
    ]  # fmt: skip
    found = {(row["metric"], row["label"]): row for row in result_rows(pd.DataFrame(rows))}
    assert found["attack_success", "harmful"]["value"] == 1 and found["attack_success", "harmful"]["n"] == 8
    assert found["attack_success:held_out", "harmful"]["n"] == 4
    assert found["flagged", "benign"]["value"] == 1
    assert found["gate_auroc", "both"]["value"] == 1
    assert ("token_auroc", "both") not in found
    token = pd.DataFrame(rows).assign(logit_safe=0.0, logit_unsafe=[-row["v_s"] for row in rows])
    found = {(row["metric"], row["label"]): row for row in result_rows(token)}
    assert found["token_auroc", "both"]["value"] == 0 and found["gate_auroc", "both"]["value"] == 1


def test_bad_media_stop_an_evaluation_before_it_begins(tiny_omni: Omni, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("not a picture")
    (tmp_path / "no.wav").write_text("not a clip")
    for part in (ImagePart(image=tmp_path / "no.png"), AudioPart(audio=tmp_path / "no.wav")):
        with pytest.raises(InputError, match="query bad"):
            check_media([Query.from_text("good"), Query(id="bad", parts=(part,))])
    with pytest.raises(InputError, match="no queries"):
        evaluate(tiny_omni, None, [])
