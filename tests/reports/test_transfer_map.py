"""Notebook 11 on tables made by hand, whose answers are known, and without any table."""

from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers.figures import assert_one_line
from helpers.paths import ROOT
from nbclient import NotebookClient
from scipy import stats

from casa_mech.errors import RunError
from casa_mech.reports.transfer_map import claims, plots, tables
from casa_mech.reports.transfer_map.correlation import organism_correlation

SURFACES = ("text", "spelled", "jailbreak", "image", "audio")
MEMBERS = [f"m{number}" for number in range(8)]
QUALITY = dict(zip(MEMBERS, np.linspace(0, 1, len(MEMBERS)), strict=True))
"""How well a gate carries over to the spelled, drawn and spoken surfaces of each member."""


def by_hand() -> tables.TransferMap:
    organisms, predictors, transfer, split, mends = [], [], [], [], []
    for member, quality in QUALITY.items():
        about = {"member": member, "seed": 0, "scale": 0.5, "tolerance": 0.3, "unasked": True, "parameters": 3}
        for surface, value in (("text", 0.99), ("image", 0.9 + 0.1 * quality)):
            place = {"measure": "probe", "surface": surface, "split": "held_out", "value": value}
            organisms.append({**about, "build_seconds": 1, **place, "least": 0.95, "most": 1.0, "met": value >= 0.95})
        organisms.append({**about, "build_seconds": 1, "measure": "probe_from_text", "surface": "image", "met": None})
        for surface in SURFACES:
            away = surface in tables.AWAY
            reach = quality if away else 1.0
            values = {"probe_from_text": 0.5 + reach / 2, "probe": 0.9, "shrinkage": 1 - reach / 2, "cosine": reach}
            for measure, value in values.items():
                predictors.append({"member": member, "surface": surface, "measure": measure, "value": value})
            for topics, value in (("seen", 0.2), ("held_out", 0.4)):
                where = {"member": member, "surface": surface, "measure": "tolerance", "topics": topics}
                predictors.append({**where, "value": value + 0.01 * quality})
            for gate_seed, off in ((0, -0.01), (1, 0.0), (2, 0.01)):
                where = {"member": member, "gate_seed": gate_seed, "surface": surface}
                transfer.append(
                    {
                        **where, "n": 10, "gate_auroc": 0.5 + 0.4 * reach + off, "token_auroc": 0.5 + 0.4 * reach,
                        "forced": 0.8 * reach, "success_before": 0.9, "success_after": 0.9 - 0.6 * reach,
                        "benign_before": 1.0, "benign_after": 0.8,
                    }
                )  # fmt: skip
                parts = {"gate": 0.4 * reach, "adapter": 0.1, "conditioning": 0.1, "breakage": 0.2, "other": 0.0}
                parts |= {"gained": -0.05}
                parts |= {"total": sum(parts.values()), "placebo": 0.7, "base placebo": 0.7}
                for label in ("harmful", "benign"):
                    split += [{**where, "label": label, "part": part, "value": v} for part, v in parts.items()]
                if member in MEMBERS[-4:]:
                    mended = {"success": 0.1, "benign": 0.9}
                    mends.append({**where, "mend": "all together", **mended})
                    mends.append({**where, "mend": "re-centred", "success": 0.9 - 0.6 * reach, "benign": 0.6})
    return tables.TransferMap(*(pd.DataFrame(rows) for rows in (organisms, predictors, transfer, split, mends)))


def test_the_card_s_thresholds_are_counted_by_member() -> None:
    counted = tables.threshold_data(by_hand())
    assert counted.loc["m0", ["thresholds", "met"]].tolist() == [2, 1]
    assert counted.loc["m0", "missed"] == "probe image held out" and counted.loc["m7", "missed"] == ""
    assert counted.loc["m0", "tolerance"] == 0.3


def test_transfer_is_the_mean_of_the_gates_with_their_range() -> None:
    data = tables.transfer_data(by_hand()).set_index(["member", "surface", "measure"])
    row = data.loc[("m7", "image", "gate_auroc")]
    assert row[["gates", "value", "low", "high"]].tolist() == pytest.approx([3, 0.9, 0.89, 0.91])


def test_predictors_stand_beside_outcomes_on_surfaces_that_the_gate_has_not_seen() -> None:
    points = tables.prediction_points(by_hand())
    assert set(points["surface"]) == set(tables.AWAY) and len(points) == 3 * len(MEMBERS)
    first = points[points["member"] == "m0"].iloc[0]
    assert first["tolerance"] == pytest.approx(0.3) and first["gate_auroc"] == pytest.approx(0.5)
    known = tables.prediction_data(points).set_index(["predictor", "outcome"])
    assert known.loc[("cosine", "gate_auroc"), "value"] == pytest.approx(1)
    assert known.loc[("shrinkage", "forced"), "value"] == pytest.approx(-1)
    # No permutation comes near: the least p there is, times the eight correlations.
    row = known.loc[("cosine", "gate_auroc")]
    assert row[["p", "p_holm"]].tolist() == pytest.approx([1 / 2000, 8 / 2000])
    # The same everywhere: there is nothing to predict from.
    assert "probe" not in known.index.get_level_values("predictor")


def points_of(x: np.ndarray, y: np.ndarray) -> pd.DataFrame:
    rows = [
        {"member": f"m{m}", "surface": f"s{s}", "x": x[m, s], "y": y[m, s]}
        for m in range(len(x))
        for s in range(x.shape[1])
    ]
    return pd.DataFrame(rows)


def test_a_difference_between_surfaces_is_no_evidence_over_organisms() -> None:
    rng = np.random.default_rng(0)
    levels = np.array([0.0, 5.0, 10.0])
    x, y = (levels + 0.1 * rng.standard_normal((12, 3)) for _ in range(2))
    correlation = organism_correlation(points_of(x, y), "x", "y")
    assert correlation is not None
    assert correlation["value"] > 0.8 and correlation["p"] > 0.05
    assert correlation["n"] == 36 and correlation["organisms"] == 12
    related = organism_correlation(points_of(x, levels + (x - levels)), "x", "y")
    assert related is not None and related["p"] < 0.01 and related["low"] > 0.9


def test_organisms_without_a_relation_are_found_as_often_as_the_test_says() -> None:
    """What an organism is good for holds on all its surfaces: 5 % of 200 sets, binomial bounds of 99.9 %."""
    rng, p_values = np.random.default_rng(1), []
    for seed in range(200):
        x, y = (rng.normal(size=(8, 1)) + 0.2 * rng.normal(size=(8, 3)) + np.arange(3) for _ in range(2))
        correlation = organism_correlation(points_of(x, y), "x", "y", seed, resamples=2, permutations=99)
        assert correlation is not None
        p_values.append(correlation["p"])
    least, most = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert least <= np.sum(np.array(p_values) <= 0.05) <= most


def test_what_cannot_be_correlated_is_left_out() -> None:
    x = np.arange(9.0).reshape(3, 3)
    assert organism_correlation(points_of(x, x), "x", "y") is None  # three organisms
    x = np.arange(15.0).reshape(5, 3)
    assert organism_correlation(points_of(x, np.ones_like(x)), "x", "y") is None
    holes = x.copy()
    holes[0, 0] = np.nan
    correlation = organism_correlation(points_of(holes, x), "x", "y", resamples=50, permutations=19)
    assert correlation is not None and correlation["n"] == 14 and correlation["value"] == pytest.approx(1)


def test_causes_are_means_over_gates_and_media() -> None:
    causes = tables.cause_data(by_hand()).set_index(["member", "part"])["value"]
    assert causes["m7"].to_dict() == pytest.approx(
        {"gate": 0.4, "adapter": 0.1, "conditioning": 0.1, "breakage": 0.2, "other": 0, "gained": -0.05, "total": 0.75}
    )
    claim = claims.cause_claim(tables.cause_data(by_hand()))
    # Over members the gate does 0.2 on average, inability 0.3.
    assert claim.value == pytest.approx(-0.1) and claim.n == 8 and "gate does 20, inability 30" in claim.title


def test_mends_are_paired_with_the_gate_of_the_paper() -> None:
    points = tables.mend_points(by_hand())
    assert set(points["member"]) == set(MEMBERS[-4:]) and len(points) == 3 * 4 * 3
    data = tables.mend_data(points).set_index("mend")
    assert data.loc["all together", ["fall", "price"]].tolist() == pytest.approx([0.8, 0.1])
    assert data.loc["re-centred", "fall"] == data.loc[tables.PAPER, "fall"]
    claim = claims.mend_claim(points)
    assert claim is not None and "all together" in claim.title and claim.n == 12
    paper = points[points["mend"] == tables.PAPER]
    assert claim.value == pytest.approx(0.7 - (paper["fall"] - paper["price"]).mean())
    empty = by_hand()
    object.__setattr__(empty, "mends", pd.DataFrame())
    assert tables.mend_points(empty).empty and claims.mend_claim(tables.mend_points(empty)) is None


def test_claims_and_figures_have_titles_of_one_line() -> None:
    maps = by_hand()
    transfer, points = tables.transfer_data(maps), tables.prediction_points(maps)
    correlations, causes, gains = tables.prediction_data(points), tables.cause_data(maps), tables.mend_points(maps)
    stated = [
        claims.transfer_claim(transfer), claims.prediction_claim(correlations), claims.cause_claim(causes),
        claims.mend_claim(gains),
    ]  # fmt: skip
    assert claims.prediction_claim(pd.DataFrame()) is None
    for claim in stated:
        assert claim is not None
        assert_one_line(claim.title)
        assert claim.low <= claim.value <= claim.high and 0 < claim.p <= 1 and claim.refuted_if
    # Every member's gate loses 0.4 times what it does not carry over, half on average.
    assert stated[0] is not None and stated[0].value == pytest.approx(-0.2)
    heading = stated[0].heading
    figures = [
        plots.plot_transfer(transfer, *heading), plots.plot_prediction(points, correlations, *heading),
        plots.plot_causes(causes, *heading), plots.plot_mends(tables.mend_data(gains), *heading),
    ]  # fmt: skip
    assert [len(figure.axes) for figure in figures] == [3, 10, 1, 2]
    assert [axis.get_xlabel() for axis in figures[1].axes[5:]] == list(tables.PREDICTORS.values())


def test_tables_are_all_there_or_none_is(tmp_path: Path) -> None:
    assert tables.read_map(tmp_path) is None
    (tmp_path / "transfer.csv").write_text("member\nall\n")
    with pytest.raises(RunError, match=r"lacks organisms\.csv"):
        tables.read_map(tmp_path)
    for name in ("organisms", "predictors", "split"):
        (tmp_path / f"{name}.csv").write_text("member\nall\n")
    read = tables.read_map(tmp_path)
    assert read is not None and read.mends.empty


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["tables", "no-tables"])
def test_the_notebook_reads_tables_and_says_where_there_are_none(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "map"
    folder.mkdir()
    maps = by_hand()
    if there:
        for name in ("organisms", "predictors", "transfer", "split", "mends"):
            getattr(maps, name).to_csv(folder / f"{name}.csv", index=False)
    content = nbformat.read(ROOT / "notebooks" / "11_transfer_map.ipynb", as_version=4)
    cell = next(cell for cell in content.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += f"\nprofile, out, map_tables = 'smoke', {str(tmp_path / 'run')!r}, {str(folder)!r}"
    NotebookClient(content, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    figures = {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}
    texts = "".join(str(output) for cell in content.cells for output in cell.get("outputs", ()))
    if there:
        assert figures == {"map_transfer", "map_predictors", "map_causes", "map_mends"} and "claim 4" in texts
    else:
        assert not figures and "casa-mech family --out" in texts
