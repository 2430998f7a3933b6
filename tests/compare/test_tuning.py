"""CoCA's alpha: chosen by hand-made curves, once for a model, on requests that no column holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from casa_mech.compare import grid as grid_module
from casa_mech.compare.command import open_folder
from casa_mech.compare.grid import Grid
from casa_mech.compare.sets import WorldSets
from casa_mech.compare.systems import ComparedSystem, system_named
from casa_mech.compare.tuning import ALPHAS, CURVE_COLUMNS, UNDEFENDED, alpha_curve, chosen_alpha
from casa_mech.compare.weights import TrainingPlan, Weights
from casa_mech.defenses.casa import world_prompts
from casa_mech.draws import Draw
from casa_mech.errors import InputError
from casa_mech.judging import MicroWorldJudge
from casa_mech.omni import GenerationSettings, Omni
from casa_mech.organism.world import default_world
from casa_mech.reports.defences.claims import alpha_heading
from casa_mech.reports.defences.plots import plot_alpha

SETTINGS = GenerationSettings(max_new_tokens=2, batch_size=16)


def curve(rates: dict[float, tuple[float, float]]) -> pd.DataFrame:
    """Rates (attack success, benign answered) by alpha."""
    return pd.DataFrame(
        [
            {"alpha": alpha, "metric": metric, "value": value}
            for alpha, pair in rates.items()
            for metric, value in zip(("attack_success", "benign_answered"), pair, strict=True)
        ]
    )


def test_the_safest_alpha_that_costs_few_benign_answers() -> None:
    rates = {-1.0: (0.9, 0.96), 0.0: (0.6, 0.95), 1.0: (0.3, 0.91), 2.0: (0.1, 0.90), 4.0: (0.0, 0.1)}
    assert chosen_alpha(curve(rates)) == 1.0  # .91 is 5 points below .96, .90 is more
    assert chosen_alpha(curve(rates), loss=0.06) == 2.0
    assert chosen_alpha(curve({**rates, 0.0: (0.3, 0.95)})) == 0.0  # of equals the one that changes least
    nothing = {-1.0: (0.9, 0.96), 0.0: (0.6, 0.5)}
    assert chosen_alpha(curve(nothing)) == UNDEFENDED  # the principle alone costs too much


def test_the_first_point_is_the_model_itself(tiny_omni: Omni) -> None:
    queries = world_prompts(3, Draw.CALIBRATION)
    table = alpha_curve(tiny_omni, queries, MicroWorldJudge(), SETTINGS, alphas=(UNDEFENDED, 0.0))
    assert len(table) == 4 and (table["n"] == 12).all() and table["chosen"].sum() == 2
    topics = {query.meta["topic"] for query in queries}
    assert topics <= {topic.word for topic in default_world().topics if topic.split == "seen"}


def test_alpha_is_chosen_once_for_a_model(tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def scripted(omni: Omni, queries: Any, *_: Any) -> pd.DataFrame:
        made.append({"n": len(queries), "seeds": {query.id.split("-")[0] for query in queries}})
        rates = curve({-1.0: (0.9, 0.9), 0.5: (0.1, 0.9)}).assign(n=9, low=0.0, high=1.0)
        return rates.assign(chosen=rates["alpha"] == 0.5)

    monkeypatch.setattr(grid_module, "alpha_curve", scripted)
    folder = open_folder(tmp_path / "grid")
    weights = Weights(TrainingPlan(16, {"max_steps": 2, "batch_size": 4}), folder, progress=False)
    given = ComparedSystem(defense="coca", options={"alpha": 4.0}, name="coca, alpha 4")
    rows = [system_named("coca"), given]

    def filled() -> Any:
        return Grid(tiny_omni, rows, WorldSets(("plain",), 2), (0, 1), folder, weights, SETTINGS, rounds=0,
                    progress=False).fill()  # fmt: skip

    result = filled()
    assert made == [{"n": 2 * 2 * 4, "seeds": {f"w{int(Draw.CALIBRATION)}"}}]  # one curve for both seeds
    assert tuple(result.curves.columns) == CURVE_COLUMNS and set(result.curves["defense"]) == {"coca"}
    again = filled()
    assert len(made) == 1 and again.computed == 0 and list(again.curves["alpha"]) == list(result.curves["alpha"])
    kept = [path.read_text() for path in (tmp_path / "grid" / "systems").rglob("system.json")]
    assert sum('"alpha": 0.5' in text for text in kept) == sum('"alpha": 4.0' in text for text in kept) == 1
    assert plot_alpha(result.curves, "t").axes

    class Shown:
        model, curves = "m", result.curves

    assert "alpha is 0.5" in alpha_heading(Shown()).title  # type: ignore[arg-type]
    Shown.curves = result.curves.assign(chosen=result.curves["alpha"] == UNDEFENDED)
    assert "no weight of CoCA's principle adds safety" in alpha_heading(Shown()).title  # type: ignore[arg-type]
    assert ALPHAS[0] == UNDEFENDED


def test_a_model_without_calibration_requests_needs_queries(tiny_omni: Omni, tmp_path: Path) -> None:
    tiny_omni.model.config.micro_world = False
    folder = open_folder(tmp_path / "grid")
    weights = Weights(TrainingPlan(), folder, progress=False)
    with pytest.raises(InputError, match="'coca' needs queries to choose alpha on: set tuning, or its option alpha"):
        Grid(tiny_omni, [system_named("coca")], WorldSets(("plain",), 2), (0,), folder, weights)
    with pytest.raises(InputError, match="alpha is chosen with the principle's logits as base; leave base out"):
        ComparedSystem(defense="coca", options={"base": "original"})
    with pytest.raises(InputError, match="tuning is for coca without an alpha"):
        ComparedSystem(defense="coca", options={"alpha": 1}, tuning=({"path": "a.csv"},))


def test_rows_with_options_have_names() -> None:
    scaled, replaced, code = (system_named(name) for name in ("casa-scale", "casa-scale-replace", "safecode-code"))
    assert scaled.training == replaced.training == {"rule": "scale"}
    assert (scaled.options, replaced.options) == ({}, {"inference_rule": "replace"})
    assert (code.defense, code.settings(0)["mode"], code.label) == ("safecode", "code", "safecode-code")
    prompted = system_named("casa-scale+safety-prompt")
    assert prompted.safety_prompt and prompted.label == "casa-scale + safety prompt"
