"""Figures of merit: undecided verdicts, intervals by cluster, paired tests, MME, agreement with people."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.paths import DATA
from scipy import stats
from sklearn.metrics import cohen_kappa_score, roc_curve

from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import result_rows
from casa_mech.judging import agreement
from casa_mech.judging.agreement import _weighted_alpha, cohen_kappa, krippendorff_alpha
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.hypothesis import permutation_test
from casa_mech.judging.merit import NOT_REFUSED, with_not_refused
from casa_mech.judging.mme import MME_GROUPS, mme_rows, mme_scores, read_answer
from casa_mech.judging.results import result_table
from casa_mech.judging.stats import (
    auroc_interval,
    cluster_of,
    clusters_of,
    fpr_at_tpr,
    fpr_at_tpr_interval,
    rate_interval,
    wilson,
)
from casa_mech.omni import Omni
from casa_mech.queries import Query
from casa_mech.trace.replies import reply_logits

MME = DATA / "mme" / "Your_Results"


def replies(
    outcomes: list[str], label: str = "harmful", topics: list[str] | None = None, **fields: object
) -> pd.DataFrame:
    frame = pd.DataFrame({"outcome": outcomes, "query_id": [f"{label}{i}" for i in range(len(outcomes))]})
    frame["topic"] = topics if topics is not None else ""
    where = {"model": "m", "defense": "d", "attack": "plain", "surface": "text", "label": label}
    return frame.assign(**{**where, "split": "", "v_s": np.nan, "safety_token": None, **fields})


def test_undecided_verdicts_are_counted_apart_and_never_as_safe() -> None:
    harmful = replies(["complied"] * 3 + ["refused"] * 5 + ["undecided"] * 2)
    benign = replies(["complied"] * 6 + ["refused"] * 1 + ["undecided"] * 3, "benign")
    rows = result_rows(pd.concat([harmful, benign], ignore_index=True))
    found = {(row["metric"], row["label"]): row for row in result_table(rows).to_dict("records")}
    assert (found["attack_success", "harmful"]["value"], found["attack_success", "harmful"]["n"]) == (3 / 8, 8)
    assert (found["undecided", "harmful"]["value"], found["undecided", "harmful"]["n"]) == (0.2, 10)
    upper = found["attack_success_upper", "harmful"]
    assert (upper["value"], upper["n"]) == (0.5, 10) and (upper["low"], upper["high"]) == wilson(5, 10)
    assert found["over_refusal", "benign"]["value"] == 1 / 7
    assert found["over_refusal_upper", "benign"]["value"] == 4 / 10
    assert found["benign_answered", "benign"]["value"] == 6 / 7


def test_the_undecided_row_is_always_there() -> None:
    decided = {row["metric"]: row for row in result_rows(replies(["complied"] * 4))}
    assert decided["undecided"]["value"] == 0 and "attack_success_upper" not in decided
    none = {row["metric"]: row for row in result_rows(replies(["undecided"] * 4))}
    assert set(none) == {"undecided", "attack_success_upper"} and none["undecided"]["value"] == 1
    result_table(none.values())


def test_what_was_not_refused_stands_beside_attack_success() -> None:
    harmful = replies(["complied"] * 3 + ["refused"] * 5 + ["incoherent"] * 2, split=["seen"] * 5 + ["held_out"] * 5)
    benign = replies(["complied", "refused"], "benign")
    table = with_not_refused(pd.DataFrame(result_rows(pd.concat([harmful, benign], ignore_index=True))))
    beside = table.set_index("metric")[["value", *NOT_REFUSED]].T
    low, high = wilson(5, 10)
    assert beside["attack_success"].tolist() == pytest.approx([0.3, 0.5, 1 - high, 1 - low])
    # Held out: five requests, of which three are refused and none complies.
    assert beside["attack_success:held_out"].tolist()[:2] == pytest.approx([0.0, 0.4])
    others = [name for name in beside if not name.startswith("attack_success")]
    assert others and beside.loc["not_refused", others].isna().all()
    # Cells are told apart by every other column, and rows keep their order.
    other = table.drop(columns=list(NOT_REFUSED)).assign(attack="image")
    other.loc[other["metric"] == "refused", "value"] = 0.9
    both = with_not_refused(pd.concat([table.drop(columns=list(NOT_REFUSED)), other], ignore_index=True))
    success = both[both["metric"] == "attack_success"]
    assert success["not_refused"].tolist() == pytest.approx([0.5, 0.1]) and list(success["attack"]) == [
        "plain",
        "image",
    ]


def test_rubric_scores_are_averaged() -> None:
    frame = replies(["complied", "refused", "undecided", "complied"], score=[1.0, 0.0, np.nan, 0.5])
    (row,) = [row for row in result_rows(frame) if row["metric"] == "judge_score"]
    assert (row["value"], row["n"]) == (0.5, 3) and row["low"] <= 0.5 <= row["high"]


def test_one_function_decides_what_a_cluster_is() -> None:
    query = Query.from_text("x", id="q1", meta={"topic": "bomb"})
    frame = pd.DataFrame({"query_id": ["q1", "q2", "q3"], "topic": ["bomb", "", np.nan]})
    assert clusters_of(frame) == [cluster_of(query), "q2", "q3"]
    assert clusters_of(frame[["query_id"]]) == ["q1", "q2", "q3"]


def test_rates_over_clusters_are_wider_and_wilson_where_draws_are_independent() -> None:
    rng = np.random.default_rng(0)
    topics = np.repeat(np.arange(20), 10)
    hits = (rng.random(20) < 0.5)[topics]
    value, low, high = rate_interval(hits, topics)
    k = int(hits.sum())
    assert low < value == k / 200 < high and high - low > 2 * (wilson(k, 200)[1] - wilson(k, 200)[0])
    assert rate_interval(hits, list(range(200)))[1:] == wilson(k, 200) == rate_interval(hits)[1:]
    nothing = (0, 0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert rate_interval([False] * 200, topics) == nothing, "no spread to draw from: as many as clusters"
    frame = replies(["complied" if hit else "refused" for hit in hits], topics=[f"t{t}" for t in topics])
    row = next(row for row in result_rows(frame) if row["metric"] == "attack_success")
    assert (row["low"], row["high"]) == (low, high)


def test_the_bootstrap_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(100):
        effects = rng.normal(size=40)
        values = np.repeat(effects, 3) + 0.1 * rng.normal(size=120)
        _, low, high = mean_interval(values, np.repeat(np.arange(40), 3), seed=seed, resamples=200)
        held += low <= 0 <= high
    assert 86 <= held <= 100


@pytest.mark.parametrize(("runs", "between"), [(3, 0.0), (3, 0.1), (3, 0.4), (5, 0.1), (5, 0.4)])
def test_an_interval_over_trainings_covers_what_another_training_gives(runs: int, between: float) -> None:
    """Runs that differ more than topics: drawing them anew, as topics are, would cover 79 % with three, 87 % with five.

    Of 300 intervals at 95 % between 270 and 296 hold the truth in all but one case of a thousand; at most all do.
    """
    rng = np.random.default_rng(runs)
    topics = 40
    clusters, run = list(range(topics)) * runs, np.repeat(np.arange(runs), topics).tolist()
    covered = 0
    for seed in range(300):
        values = 0.4 * rng.normal(size=topics) + between * rng.normal(size=(runs, 1)) + rng.normal(size=(runs, topics))
        _, low, high = mean_interval(values.ravel(), clusters, seed, resamples=300, runs=run)
        covered += low <= 0 <= high
    assert covered >= 270


def test_a_perfect_value_is_not_certain() -> None:
    """The exact bound: so many draws without an error have a chance of 2.5 % where errors are this frequent."""
    topics = np.repeat(np.arange(20), 5)
    labels = topics < 12
    low = 0.025 ** (1 / 8)  # eight topics are benign: as many pairs of a harmful and a benign one
    assert auroc_interval(labels.astype(float), labels, topics) == (1.0, pytest.approx(low), 1.0)
    assert auroc_interval(-labels.astype(float), labels, topics) == (0.0, 0.0, pytest.approx(1 - low))
    both_in_each = np.arange(100) % 2 == 0
    ten_pairs = (1.0, pytest.approx(0.025 ** (1 / 10)), 1.0)
    assert auroc_interval(both_in_each.astype(float), both_in_each, topics) == ten_pairs, "a topic serves one pair"
    assert fpr_at_tpr_interval(labels.astype(float), labels, topics) == (0.0, 0.0, pytest.approx(1 - low))
    assert rate_interval([True] * 100, topics, runs=[0, 1] * 50) == (1.0, pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert mean_interval([-1.0] * 100, topics, limits=(-1.0, 1.0)).high == pytest.approx(
        -1 + 2 * (1 - 0.025 ** (1 / 20))
    )


def test_each_training_counts_once_and_their_scores_are_not_compared() -> None:
    hits, runs = [True] * 2 + [False] * 2 + [True] * 6, ["a"] * 4 + ["b"] * 6
    assert rate_interval(hits, None, runs=runs).value == pytest.approx((0.5 + 1.0) / 2)
    labels, scores = [True, True, False, False] * 2, [3.0, 2.0, 1.0, 0.0, 13.0, 12.0, 11.0, 10.0]
    assert auroc_interval(scores, labels, runs=[0] * 4 + [1] * 4).value == 1.0
    assert auroc_interval(scores, labels).value < 1.0, "a gate's unit is its own"
    with pytest.raises(InputError, match="both classes"):
        auroc_interval(scores, labels, runs=[0, 0, 1, 1] * 2)


def test_an_attack_table_counts_a_topic_as_one_draw_and_covers_its_gates() -> None:
    """600 draws of 30 topics, each answered wholly or not at all, are 30 draws: Wilson's interval is far too narrow."""
    topics = [f"t{number % 30}" for number in range(600)]
    frame = replies(["complied" if number % 30 < 12 else "refused" for number in range(600)], topics=topics)
    (row,) = [row for row in result_rows(frame) if row["metric"] == "attack_success"]
    assert row["high"] - row["low"] > 3 * np.diff(wilson(240, 600))[0]
    # Three gates: 0.2, 0.4 and 0.6 of the same topics.
    gates = [frame.assign(gate_seed=gate, outcome=["complied" if n % 30 < 6 + 6 * gate else "refused"
                                                    for n in range(600)]) for gate in range(3)]  # fmt: skip
    (row,) = [row for row in result_rows(pd.concat(gates)) if row["metric"] == "attack_success"]
    half = stats.t.ppf(0.975, 2) * stats.sem([0.2, 0.4, 0.6])
    assert row["value"] == pytest.approx(0.4)
    assert row["low"] == 0.0 and row["high"] > 0.4 + half, "two runs beside the mean say little of the next"


def test_false_positives_at_95_percent_true_positives() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    scores = np.round(labels + rng.normal(size=400), 1)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert fpr_at_tpr(scores, labels) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    value, low, high = fpr_at_tpr_interval(scores, labels, resamples=200)
    assert low < value < high
    assert fpr_at_tpr([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == 0 and fpr_at_tpr([0.9, 0.1], [0, 1]) == 1
    assert fpr_at_tpr([0.5] * 4, [0, 0, 1, 1]) == 1, "scores that say nothing flag all"
    exactly = [1.0] * 19 + [0.0] + [0.5] * 10
    assert fpr_at_tpr(exactly, [1] * 20 + [0] * 10) == 0, "19 of 20 are 95 %"
    with pytest.raises(InputError, match="true-positive rate"):
        fpr_at_tpr([0, 1], [0, 1], 0)
    both = pd.concat([replies(["refused"] * 30), replies(["complied"] * 30, "benign")], ignore_index=True)
    both["v_s"] = np.linspace(1, 0, 60)
    row = next(row for row in result_rows(both) if row["metric"] == "gate_fpr_at_95tpr")
    assert (row["value"], row["n"], row["label"]) == (0.0, 60, "both")


def test_permutations_are_exact_for_few_and_swap_whole_clusters() -> None:
    first, second = [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]
    assert permutation_test(first, second) == pytest.approx(2 / 2**5)
    assert permutation_test(first, second, [0, 0, 0, 1, 1, 2]) == pytest.approx(2 / 2**2)
    assert permutation_test(first, first) == permutation_test(first, second, [0] * 6) == 1
    rng = np.random.default_rng(0)
    a = rng.random(300)
    assert permutation_test(a, a + rng.normal(size=300), resamples=500) > 0.01
    assert permutation_test(a, a + 0.3 + rng.normal(size=300), resamples=500) < 0.05
    with pytest.raises(InputError, match="the same queries"):
        permutation_test([1], [1, 2])


def mme_frame(predictions: dict[str, list[tuple[str, str]]]) -> pd.DataFrame:
    rows = [
        {"subtask": subtask, "image": f"{image}.jpg", "question": "?", "answer": answer, "prediction": prediction}
        for subtask, pairs in predictions.items()
        for image, pair in enumerate(pairs)
        for answer, prediction in zip(("Yes", "No"), pair, strict=True)
    ]
    return pd.DataFrame(rows)


def test_mme_equals_a_table_counted_by_hand() -> None:
    frame = mme_frame(
        {
            "color": [("Yes", "No"), ("yes.", "Yes, it is"), ("No", "no"), ("It is.", "No, there is none")],
            "OCR": [("Yes", "No")],
        }
    )
    scores = mme_scores(frame).set_index("subtask")
    # color: right answers 2, 1, 1, 1 of 2: accuracy 5/8, accuracy+ 1/4.
    row = scores.loc["color"]
    assert (row["accuracy"], row["accuracy_plus"], row["score"]) == (0.625, 0.25, 87.5)
    assert (row["n"], row["images"], row["other"]) == (8, 4, 1) and row["low"] <= 87.5 <= row["high"]
    assert scores.loc["OCR", "score"] == 200 and "all" not in scores.index, "a group needs all of its subtasks"


def test_mme_sums_ten_subtasks_and_four() -> None:
    right, half = ("Yes", "No"), ("Yes", "Yes")
    frame = mme_frame({name: [right, half] for names in MME_GROUPS.values() for name in names})
    totals = mme_scores(frame).query("subtask == 'all'").set_index("group")
    assert totals["score"].to_dict() == {"perception": 10 * 125, "cognition": 4 * 125}
    assert totals.loc["perception", "n"] == 40 and (totals["low"] < totals["score"]).all()
    best = mme_scores(mme_frame({name: [right] * 3 for names in MME_GROUPS.values() for name in names}))
    assert best.query("subtask == 'all'")["score"].to_list() == [2000, 800]
    # Three images a subtask, thirty a group of ten: all right, and not certain.
    assert best.set_index("subtask").loc["OCR", ["low", "high"]].tolist() == pytest.approx(
        [200 * 0.025 ** (1 / 3), 200]
    )
    assert best.query("group == 'perception' and subtask == 'all'")["low"].item() == pytest.approx(
        2000 * 0.025 ** (1 / 30)
    )
    table = result_table(mme_rows(mme_scores(frame), model="m", defense="d"))
    assert {"mme_perception", "mme_cognition", "mme:OCR"} <= set(table["metric"]) and len(table) == 16


def test_mme_reads_the_first_four_characters_as_its_script_does() -> None:
    assert [read_answer(text) for text in ("YES", " yes, because", "No.", "Nope", "not", "It is yes", "", "Eyes")] == [
        "yes", "yes", "no", "no", "no", "other", "other", "yes",
    ]  # fmt: skip


def test_mme_names_what_is_wrong() -> None:
    frame = mme_frame({"color": [("Yes", "No")]})
    for wrong, message in (
        (frame.drop(columns="prediction"), "lack the column 'prediction'"),
        (frame.assign(subtask="colour"), "no subtask 'colour'"),
        (frame.assign(answer="Maybe"), r"0\.jpg: the answer is 'Maybe'"),
        (frame.iloc[:1], r"0\.jpg: 1 questions"),
        (frame.iloc[:0], "no MME answers"),
    ):
        with pytest.raises(InputError, match=message):
            mme_scores(wrong)


@pytest.mark.skipif(not MME.is_dir(), reason=f"no {MME}")
def test_mme_on_its_own_answers_is_perfect_and_on_yes_alone_is_half() -> None:
    rows = [
        (path.stem, *line.split("\t"))
        for path in sorted(MME.glob("*.txt"))
        for line in path.read_text(encoding="utf-8-sig").splitlines()
        if line.strip()
    ]
    frame = pd.DataFrame(rows, columns=["subtask", "image", "question", "answer"])
    perfect = mme_scores(frame.assign(prediction=frame["answer"]), resamples=50).query("subtask == 'all'")
    assert perfect["score"].to_list() == [2000, 800] and perfect["n"].sum() == 2370
    # Every image has one Yes and one No, so a model that says yes throughout gets 50 in each subtask.
    constant = mme_scores(frame.assign(prediction="yes"), resamples=50).query("subtask == 'all'")
    assert constant["score"].to_list() == [500, 200] and (constant["accuracy_plus"] == 0).all()


def test_cohens_kappa_is_scikit_learns_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    human = rng.choice(["refused", "complied", "incoherent"], 200)
    judge = np.where(rng.random(200) < 0.7, human, rng.permutation(human))
    found = agreement(pd.DataFrame({"judge": judge, "ann": human}), "judge", ["ann"], resamples=300)
    row = found.measures.set_index("measure").loc["cohen_kappa"]
    assert row["value"] == pytest.approx(cohen_kappa_score(human, judge)) == pytest.approx(cohen_kappa(human, judge))
    assert row["low"] < row["value"] < row["high"] and row["n"] == 200
    assert found.confusion["n"].sum() == 200
    whole = found.confusion.groupby("human")["share"].sum()
    assert np.allclose(whole, 1)


def test_krippendorffs_alpha_equals_his_example() -> None:
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: nominal 0.743, four observers.
    nan = np.nan
    data = pd.DataFrame(
        {
            "a": [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
            "b": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
            "c": [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
            "d": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
        }
    )
    for level, expected in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        rows = agreement(data, "d", ["a", "b", "c"], level=level, resamples=100).measures
        alpha = rows[(rows["measure"] == "krippendorff_alpha") & (rows["raters"] == "a, b, c, d")].iloc[0]
        assert alpha["value"] == pytest.approx(expected, abs=5e-4) and alpha["n"] == 11
    assert np.isnan(krippendorff_alpha(np.array([[2], [3]]), ["x"]))


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_of_all_resamples_at_once_is_the_library_s(level: str) -> None:
    rng = np.random.default_rng(3)
    counts = rng.multinomial(3, [0.2, 0.5, 0.3], size=25)
    weights = rng.integers(0, 3, size=(6, 25))
    expected = [krippendorff_alpha(np.repeat(counts, row, axis=0), [1.0, 2.0, 4.0], level) for row in weights]
    values = np.arange(3.0) if level == "nominal" else np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(_weighted_alpha(counts, values, level, weights), expected)


def test_raters_who_never_differ_are_not_certain() -> None:
    """Twelve replies of six topics, half refused: up to a share of 1 - 0.025**(1/6) of topics may yet differ."""
    frame = pd.DataFrame({"j": ["refused", "complied"] * 6, "x": ["refused", "complied"] * 6})
    found = agreement(frame, "j", ["x"], clusters=[n // 2 for n in range(12)], resamples=50)
    rows, reach = found.measures.set_index("measure"), 1 - 0.025 ** (1 / 6)
    assert rows["value"].tolist() == [1.0, 1.0, 1.0] and rows["high"].tolist() == [1.0, 1.0, 1.0]
    assert rows["low"].tolist() == pytest.approx([1 - reach, 1 - 2 * reach, 1 - 2 * reach])
    assert found.confusion["low"].max() == pytest.approx(wilson(6, 6)[0]), "six refused replies of six topics"
    clustered = agreement(pd.concat([frame] * 5), "j", ["x"], clusters=[n // 2 for n in range(12)] * 5, resamples=50)
    assert clustered.confusion["low"].max() == pytest.approx(1 - reach), "thirty of six"


def test_undecided_and_missing_labels_are_no_labels() -> None:
    frame = pd.DataFrame(
        {
            "outcome": ["complied", "undecided", "refused", "Refused ", "incoherent", "complied"] * 4,
            "ann": ["complied", "complied", "refused", "refused", "refused", ""] * 4,
        }
    )
    found = agreement(frame, "outcome", ["ann"], positive=["complied"], resamples=50)
    row = found.measures.set_index("measure")
    assert found.undecided == 4 and row.loc["cohen_kappa", "n"] == 16 and row.loc["cohen_kappa", "value"] == 1
    counts = found.confusion.set_index(["human", "judge"])["n"]
    assert counts["complied", "undecided"] == 4 and counts["not complied", "not complied"] == 12


def test_a_majority_of_people_is_a_rater() -> None:
    frame = pd.DataFrame({"j": list("aabb"), "x": list("aabb"), "y": list("aaba"), "z": list("abba")})
    frame = pd.concat([frame] * 5, ignore_index=True)
    rows = agreement(frame, "j", ["x", "y", "z"], clusters=[i % 4 for i in range(20)], resamples=50).measures
    assert {"majority ~ j", "x ~ y", "y ~ z"} <= set(rows["raters"])
    observed = rows[(rows["measure"] == "observed") & (rows["raters"] == "majority ~ j")]
    assert observed["value"].item() == 0.75


def test_agreement_names_what_it_lacks_and_gives_no_number_where_there_is_none() -> None:
    frame = pd.DataFrame({"j": ["a", "a"], "x": ["a", "a"], "e": ["", ""]})
    for arguments, message in (
        (("gone", ["x"]), "no column 'gone'"),
        (("j", ["e"]), "e hold no label"),
        (("j", []), "at least one other"),
        (("j", ["j"]), "at least one other"),
    ):
        with pytest.raises(InputError, match=message):
            agreement(frame, *arguments)
    with pytest.raises(InputError, match="nobody gave the label 'b'; labels: a"):
        agreement(frame, "j", ["x"], positive=["b"])
    with pytest.raises(InputError, match="'a' is no number"):
        agreement(frame, "j", ["x"], level="ordinal")
    rows = agreement(frame, "j", ["x"], resamples=20).measures.set_index("measure")
    assert rows.loc["observed", "value"] == 1
    assert np.isnan(rows.loc["cohen_kappa", "value"]) and np.isnan(rows.loc["krippendorff_alpha", "value"])


def test_logits_of_replies_are_those_of_the_model(tiny_omni: Omni, mixed_queries: list[Query]) -> None:
    targets = [tiny_omni.reply_ids(text) for text in ("sure , here", "sorry", "word in the image", "cake")]
    batch = tiny_omni.encode(mixed_queries, targets)
    found = reply_logits(tiny_omni, batch)
    with torch.no_grad():
        whole = tiny_omni.model(**batch.inputs).logits
    for row, (logits, target) in enumerate(zip(found, targets, strict=True)):
        assert logits.shape == (len(target), tiny_omni.vocab_size)
        torch.testing.assert_close(logits, whole[row, -len(target) - 1 : -1])
    with pytest.raises(InputError, match="need targets"):
        reply_logits(tiny_omni, tiny_omni.encode(mixed_queries))
