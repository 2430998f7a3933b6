"""MME (arXiv 2306.13394): yes/no questions on pictures, and the layout of its result files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from casa_mech.errors import InputError
from casa_mech.queries.benchmarks.benchmark import WHOLE, Benchmark, File, Record, Row, meta_of
from casa_mech.queries.tables import cell, read_lines, read_records

if TYPE_CHECKING:
    import pandas as pd

RESULTS = "Your_Results"
MME_SUBTASKS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
_COLUMNS = ("subtask", "image", "question", "answer", "prediction")


def read_mme_results(folder: Path | str) -> pd.DataFrame:
    """Answers in MME's official layout: `<subtask>.txt` with `image, question, answer[, prediction]` a line, by tabs.

    Returns:
        A row for each line: `subtask, image, question, answer, prediction`, all text; the prediction is "" where a line
        has none, as in the published template.

    Raises:
        InputError: no such folder, no subtask's file in it, or a line with other than three or four cells; the message
            names the file and line.
    """
    import pandas as pd

    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give the one with MME's result files, such as existence.txt")
    files = [folder / f"{subtask}.txt" for subtask in MME_SUBTASKS if (folder / f"{subtask}.txt").is_file()]
    if not files:
        raise InputError(f"{folder}: holds none of MME's result files ({', '.join(MME_SUBTASKS[:3])}, ... .txt)")
    rows = [
        (file.stem, *_cells(file, number, line)) for file in files for number, line in enumerate(read_lines(file), 1)
    ]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _cells(file: Path, number: int, line: str) -> tuple[str, str, str, str]:
    cells = [part.strip() for part in line.split("\t")]
    if len(cells) not in (3, 4):
        raise InputError(
            f"{file} line {number}: {len(cells)} cells; MME has image, question, answer and prediction, parted by tabs"
        )
    image, question, answer, prediction = [*cells, ""][:4]
    return image, question, answer, prediction


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_records(path)
    results = path.parent / RESULTS
    if not results.is_dir() or not records or "text" not in records[0]:
        return records
    answers = {
        (row["subtask"], row["image"], _asked(row["question"])): row["answer"]
        for row in read_mme_results(results).to_dict("records")
    }
    return [{**record, "answer": answers.get(_key(record))} for record in records]


def _key(record: Record) -> tuple[str, str, str]:
    # The question file has another last sentence than the result files, and sometimes another suffix for a picture.
    return cell(record.get("category")), Path(cell(record.get("image"))).name, _asked(cell(record.get("text")))


def _asked(question: str) -> str:
    return question.split("\n")[0].removesuffix("Please answer yes or no.").strip()


def _row(record: Record, file: File) -> Row:
    meta = meta_of(record, category="category", image="image", answer="answer")
    return Row(cell(record["text"]), "benign", meta, media=cell(record["image"]))


MME = (
    Benchmark(
        name="mme",
        summary="yes/no questions on pictures, two a picture: utility",
        label="benign",
        rows=2374,
        licence="academic use",
        origin="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (pictures, by request) and LLaVA's "
        "evaluation data (llava_mme.jsonl, with Your_Results/ beside it)",
        modality="image",
        files={WHOLE: ("llava_mme.jsonl",)},
        columns=("image", "text", "category"),
        row=_row,
        records=_records,
        media=("images", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "."),
    ),
)
