"""JailbreakV-28k (arXiv 2404.03027): jailbreak prompts with a picture, and the plain query behind each."""

from __future__ import annotations

from casa_mech.queries.benchmarks.benchmark import WHOLE, Benchmark, File, Record, Row, has, meta_of
from casa_mech.queries.tables import cell

_PAGE = "https://huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k"
_TEXT_ATTACKS = ("Template", "Persuade", "Logic")
_IMAGE_ATTACKS = ("figstep", "SD", "SD_typo", "typo")


def _row(record: Record, file: File) -> Row:
    meta = meta_of(record, request="redteam_query", policy="policy", format="format", origin="from", image="image_path")
    return Row(cell(record["jailbreak_query"]), "harmful", meta, media=meta.get("image", ""))


def _set(name: str, rows: int, summary: str, file: str, origin: str, on_hub: bool = True) -> Benchmark:
    return Benchmark(
        name=name,
        summary=summary,
        label="harmful",
        rows=rows,
        licence="MIT",
        origin=origin,
        modality="image",
        files={WHOLE: (file,)},
        columns=("jailbreak_query", "redteam_query", "format", "policy", "image_path"),
        row=_row,
        select={
            "text-attacks": has("format", *_TEXT_ATTACKS),
            "image-attacks": has("format", *_IMAGE_ATTACKS),
        },
        media=(".", "images", "../images"),
        remote={WHOLE: f"hf://datasets/JailbreakV-28K/JailBreakV-28k/JailBreakV_28K/{file}"} if on_hub else {},
    )


JAILBREAKV = (
    _set(
        "jailbreakv-28k",
        28_000,
        "20,000 text jailbreaks with unrelated pictures, 8,000 image attacks",
        "JailBreakV_28K.csv",
        f"{_PAGE} (JailBreakV_28K/JailBreakV_28K.csv and its picture folders)",
    ),
    _set(
        "jailbreakv-28k-mini",
        280,
        "the official mini split",
        "mini_JailBreakV_28K.csv",
        f"{_PAGE} (JailBreakV_28K/mini_JailBreakV_28K.csv and its picture folders)",
    ),
    _set(
        "jailbreakv-28k-selected",
        300,
        "a selection of text jailbreaks in the same format",
        "selected_JBV28K.csv",
        f"a published selection of JailbreakV-28k's rows; pictures from {_PAGE}",
        on_hub=False,
    ),
)
