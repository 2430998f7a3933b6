"""The notebook's panel on real English: a gate that is trained and measured once in the run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.errors import InputError
from casa_mech.evaluation.evaluate import CASA
from casa_mech.judging import read_table
from casa_mech.queries.benchmarks.locate import DATA_VARIABLE, data_folder
from casa_mech.reports.english.gate import MANIFEST, GateSizes, english_gate
from casa_mech.study import Study
from casa_mech.study.settings import slug


def english_panel(study: Study, model: str = "", data: str = "") -> tuple[pd.DataFrame, str]:
    """The notebook's panel: the rows of `english_gate`, made once in the run folder, and what there is to say of them.

    Without a folder of data, or with a model that does not speak English, there are no rows, and the text says so.

    Args:
        study: whose run folder and sizes are used.
        model: default the one under study.
        data: default the folder that CASA_MECH_DATA names.

    Raises:
        InputError: as `english_gate`; a folder of data that is not there.
    """
    model = model or study.settings.model
    folder = Path(data) if data else data_folder()
    if folder is None:
        return (
            pd.DataFrame(),
            f"no panel on real English: no folder of prompt sets (parameter data, or {DATA_VARIABLE})",
        )
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the folder of prompt sets, or an empty text to go without")
    if study.omni(model).speaks_micro_world:
        why = f"{slug(model)} knows the micro-world's words alone"
        return pd.DataFrame(), f"no panel on real English: {why}; name a model that reads it (parameter english)"
    sizes = GateSizes(
        examples=2 * study.sizes.train_examples,
        steps=study.sizes.train_steps,
        n=study.sizes.n_eval,
        n_media=max(6, study.sizes.n_eval // 4),
    )
    settings = study.settings
    key = {"model": study.omni(model).fingerprint(), "seed": settings.seed, "sizes": vars(sizes), "data": str(folder)}
    work = study.folder.path("english", slug(model))

    def build(new: Path) -> None:
        shared: dict[str, Any] = {"seed": settings.seed, "device": settings.device, "dtype": settings.dtype}
        english_gate(model, folder, work, sizes=sizes, progress=study.progress, **shared)
        shutil.copy(work / "results.parquet", new)
        shutil.copy(work / MANIFEST, new)

    kept = study.folder.artifact("english-rows", slug(model), key, build)
    record = json.loads((kept / MANIFEST).read_text(encoding="utf-8"))
    note = f"{slug(model)}: {record['corpus']['removed']} training prompts taken out, which evaluation sets ask"
    return read_table(kept / "results.parquet"), "; ".join([note, *record["missing_sets"]])


def english_title(rows: pd.DataFrame) -> str:
    """The title of the English figure: AUROC of v_s on every panel."""
    part = rows[(rows["metric"] == "gate_auroc") & (rows["defense"] == CASA)]
    lines = [
        f"{name}: " + ", ".join(f"{row.surface} {row.value:.2f}" for row in panel.itertuples())
        for name, panel in part.groupby("attack", sort=False)
    ]
    return f"{slug(str(rows['model'].iloc[0]))}: AUROC of v_s on prompts that nobody here wrote\n" + "\n".join(lines)
