"""MM-SafetyBench (arXiv 2311.17600): 13 scenarios, each question in text and with three kinds of picture.

The wording goes with the picture: `Rephrased Question(SD)` with SD, `Rephrased Question` with TYPO and SD_TYPO,
`Question` with none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks.benchmark import WHOLE, Benchmark, File, Record, Row, has, meta_of
from casa_mech.queries.tables import cell, read_json

TINY_LIST = "TinyVersion_ID_List.json"
_SCENARIOS = tuple(f"{number:02d}" for number in range(1, 14))
# What the published judge asks of these five is a disclaimer, not the absence of harm.
_POLICY_SCENARIOS = ("08", "10", "11", "12", "13")
_WORDING = {"SD": "Rephrased Question(SD)", "TYPO": "Rephrased Question", "SD_TYPO": "Rephrased Question"}
_ORIGIN = "https://github.com/isXinLiu/MM-SafetyBench (data/processed_questions, imgs, TinyVersion_ID_List.json)"


def _records(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise InputError(f"{path}: expected an object of questions by id; get it anew from {_ORIGIN}")
    tiny = _tiny_ids(path)
    marks = {} if tiny is None else {key: "yes" if key in tiny.get(path.stem, ()) else "no" for key in content}
    return [{**entry, "id": key, "scenario": path.stem, "tiny": marks.get(key)} for key, entry in content.items()]


def _tiny_ids(path: Path) -> Mapping[str, set[str]] | None:
    for folder in path.resolve().parents[:3]:
        if (folder / TINY_LIST).is_file():
            listed = read_json(folder / TINY_LIST)
            try:
                return {entry["Scenario"]: set(map(str, entry["Sampled_ID_List"])) for entry in listed}
            except (KeyError, TypeError):
                raise InputError(
                    f"{folder / TINY_LIST}: expected a list of Scenario and Sampled_ID_List; get it anew from {_ORIGIN}"
                ) from None
    return None


def _text_row(record: Record, file: File) -> Row:
    meta = meta_of(
        record, scenario="scenario", tiny="tiny", key_phrase="Key Phrase", phrase_type="Phrase Type",
        rephrased="Rephrased Question", changed_question="Changed Question",
    )  # fmt: skip
    number = meta["scenario"][:2]
    meta |= {"number": number, "scope": "policy" if number in _POLICY_SCENARIOS else "harm"}
    return Row(cell(record["Question"]), "harmful", meta, key=f"{number}-{record['id']}")


def _picture_row(kind: str) -> Callable[[Record, File], Row]:
    def row(record: Record, file: File) -> Row:
        plain = _text_row(record, file)
        picture = f"{plain.meta['scenario']}/{kind}/{record['id']}.jpg"
        meta = {**plain.meta, "request": plain.text, "image": picture, "picture": kind}
        return Row(cell(record[_WORDING[kind]]), "harmful", meta, key=plain.key, media=picture)

    return row


def _set(name: str, kind: str, summary: str) -> Benchmark:
    return Benchmark(
        name=name,
        summary=summary,
        label="harmful",
        rows=1680,
        split_rows={"tiny": 168},
        licence="CC BY-NC 4.0",
        origin=_ORIGIN,
        modality="image" if kind else "text",
        files={WHOLE: ("processed_questions/[01][0-9]-*.json",)},
        columns=("Question", "Changed Question", "Key Phrase", "Rephrased Question", "Rephrased Question(SD)"),
        row=_picture_row(kind) if kind else _text_row,
        records=_records,
        select={
            "tiny": has("tiny", "yes"),
            "harm": has("scope", "harm"),
            "policy": has("scope", "policy"),
            **{number: has("number", number) for number in _SCENARIOS},
        },
        media=("../imgs", "../../imgs", "imgs") if kind else (),
        family="mm-safetybench",
    )


MM_SAFETYBENCH = (
    _set("mm-safetybench", "", "its questions in text"),
    _set("mm-safetybench-sd", "SD", "a generated photo of the key phrase"),
    _set("mm-safetybench-typo", "TYPO", "the key phrase as a picture of text"),
    _set("mm-safetybench-sd-typo", "SD_TYPO", "the photo above the picture of text"),
)
