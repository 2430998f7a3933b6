"""The public benchmarks read from the real files, where they are: all rows, all pictures, all encode."""

import pytest
from helpers.paths import DATA, HAS_DATA

from casa_mech.omni import Omni
from casa_mech.queries import Query, matches, read_benchmark, read_mme_results, read_queries
from casa_mech.queries.benchmarks.locate import DATA_VARIABLE
from casa_mech.queries.benchmarks.mme import MME_SUBTASKS

pytestmark = pytest.mark.skipif(not HAS_DATA, reason=f"no data sets at {DATA} (set {DATA_VARIABLE})")

# The rows that the folder's README states, after its own filter.
REAL_ROWS = {
    "advbench": 506, "refusal-direction-harmful": 284, "refusal-direction-harmless": 31_323, "redteam-2k": 1821,
    "jailbreakv-28k-selected": 291, "jailbreakv-28k-mini": 262, "safebench": 438, "figstep": 438, "safebench-tiny": 45,
    "figstep-tiny": 45, "figstep-benign": 300, "mm-safetybench": 1553, "mm-safetybench-sd": 1553,
    "mm-safetybench-typo": 1553, "mm-safetybench-sd-typo": 1553, "xstest": 442, "alpaca-eval": 805, "alpaca": 31_323,
    "alpaca-seed": 175, "mme": 2368,
}  # fmt: skip
REAL_SPLITS = {
    ("refusal-direction-harmful", "train"): 247, ("refusal-direction-harmful", "val"): 37,
    ("refusal-direction-harmless", "test"): 6266, ("xstest", "safe"): 250,
}  # fmt: skip


@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_rows_are_all_read_and_encode(tiny_omni: Omni, name: str) -> None:
    reading = read_benchmark(name, DATA, missing_media="text")
    assert reading.rows == REAL_ROWS[name]
    assert len(reading.queries) + len(reading.dropped) == reading.rows
    assert len(reading.dropped) <= 3  # the folder was filtered before; what is left is on the filter's edge
    assert len({query.id for query in reading.queries}) == len(reading.queries)
    texts = [Query.from_text(query.text, id=query.id) for query in reading.queries][
        :: max(1, len(reading.queries) // 200)
    ]
    for start in range(0, len(texts), 32):
        assert tiny_omni.encode(texts[start : start + 32]).size


def test_real_splits_have_their_rows() -> None:
    for (name, split), rows in REAL_SPLITS.items():
        assert read_benchmark(name, DATA, split=split).rows == rows


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("figstep-tiny", None, 45),
        ("mm-safetybench-sd", "tiny", 156),
        ("mm-safetybench-typo", "tiny", 156),
        ("mm-safetybench-sd-typo", "tiny", 156),
    ],
)
def test_real_pictures_resolve_and_encode(tiny_omni: Omni, name: str, split: str | None, rows: int) -> None:
    queries = read_queries(name, DATA, split=split)
    assert len(queries) == rows
    assert all(query.modalities == {"image", "text"} and query.parts[0].image.is_file() for query in queries)
    assert tiny_omni.encode(queries[:: rows // 6]).size >= 6


def test_real_answers_join_the_questions_of_mme() -> None:
    queries = read_queries("mme", DATA, missing_media="text")
    assert sum(query.meta.get("answer") in ("Yes", "No") for query in queries) == 2366  # two questions have none there
    results = read_mme_results(DATA / "mme" / "Your_Results")
    assert len(results) == 2370
    assert set(results["subtask"]) == set(MME_SUBTASKS)


def test_real_overlaps_are_those_that_were_counted_elsewhere() -> None:
    harmful, redteam, train = (
        read_queries(name, DATA, split=split, drop_minors=False)
        for name, split in (("advbench", None), ("redteam-2k", None), ("refusal-direction-harmful", "train"))
    )
    found = matches(harmful, redteam)
    assert sum(match.kind == "exact" for match in found) == 65  # as the folder's notes have it
    # The notes count 117 before rows about minors were taken out of both.
    assert sum(match.kind == "exact" for match in matches(harmful, train)) == 112
    safebench = read_queries("safebench", DATA)
    assert not any(match.kind == "exact" for match in matches(safebench, [*harmful, *redteam, *train]))
