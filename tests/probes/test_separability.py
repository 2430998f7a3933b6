"""Separability on data whose answer is known: Gaussians, with scikit-learn as the outside judge."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from casa_mech.errors import InputError
from casa_mech.figures import save_figure
from casa_mech.reports.attack_success.plots import plot_rates
from casa_mech.reports.separability.plots import plot_controls, plot_matrix, plot_planes, plot_probes
from probes.activations import Activations
from probes.activations.index import INDEX_COLUMNS
from probes.linear.separability import controls, fisher_ratio, pca_plane, separability_table, transfer_matrix
from probes.linear.validation import auroc_of, cross_validate

N_TOPICS, PER_TOPIC, WIDTH = 30, 4, 16


def _gaussians(gap: float, surface: str = "text", seed: int = 0, turn: bool = False) -> Activations:
    """Two classes of topics `gap` apart along the first axis (`turn`: the second); queries are noisy copies."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(N_TOPICS) % 2 == 0
    centres = 0.3 * rng.standard_normal((N_TOPICS, WIDTH))
    centres[:, int(turn)] += np.where(harmful, gap / 2, -gap / 2)
    topic = np.repeat(np.arange(N_TOPICS), PER_TOPIC)
    states = centres[topic] + rng.standard_normal((len(topic), WIDTH))
    index = pd.DataFrame(dict.fromkeys(INDEX_COLUMNS, ""), index=range(len(topic)))
    index["query_id"] = [f"{surface}-{number}" for number in range(len(topic))]
    index["label"] = np.where(harmful[topic], "harmful", "benign")
    index["topic"], index["surface"] = [f"topic-{number}" for number in topic], surface
    return Activations({"norm": states.astype(np.float32)}, index, "mean")


def _joined(*parts: Activations) -> Activations:
    states = {"norm": np.concatenate([part.states["norm"] for part in parts])}
    return Activations(states, pd.concat([part.index for part in parts], ignore_index=True), "mean")


def _auroc(fit: Activations, test: Activations) -> float:
    """Of a logistic probe fitted on `fit` and judged on `test`, on unseen topics."""
    _, carried = cross_validate(fit.stacked(), fit.harmful, fit.topics, others=[(test.stacked(), test.topics)])
    return float(auroc_of(carried.scores[0], test.harmful))


def test_probe_grows_with_separation_and_meets_chance_without() -> None:
    values = [_auroc(_gaussians(gap), _gaussians(gap)) for gap in (0.0, 1.0, 2.0, 4.0)]
    assert values == sorted(values)
    assert abs(values[0] - 0.5) < 0.15
    assert values[-1] > 0.95


def test_probe_nears_the_best_possible_score() -> None:
    data = _gaussians(2.0)
    row = transfer_matrix(data, deals=0).iloc[0]
    best = roc_auc_score(data.harmful, data.states["norm"][:, 0])
    assert row["low"] <= row["auroc"] <= row["high"]
    assert best - 0.1 < row["auroc"] < best + 0.05


def test_topics_stay_together() -> None:
    """Topics that are random but tight: a probe that met them would be perfect, one on unseen topics is at chance."""
    data = _gaussians(0.0)
    states = np.random.default_rng(1).standard_normal((N_TOPICS, 64)).astype(np.float32) * 5
    tight = Activations({"norm": np.repeat(states, PER_TOPIC, axis=0)}, data.index, "mean")
    assert abs(_auroc(tight, tight) - 0.5) < 0.25


def test_transfer_follows_the_shared_direction() -> None:
    text = _gaussians(4.0)
    same = _auroc(text, _gaussians(4.0, "image", seed=1))
    turned = _auroc(text, _gaussians(4.0, "audio", seed=2, turn=True))
    assert same > 0.95
    assert abs(turned - 0.5) < 0.2


def test_fisher_ratio_is_finite_when_dimensions_outnumber_queries() -> None:
    rng = np.random.default_rng(0)
    states, harmful = rng.standard_normal((20, 200)), np.arange(20) < 10
    near, far = (fisher_ratio(states + gap * harmful[:, None], harmful) for gap in (0.0, 3.0))
    assert np.isfinite(near) and np.isfinite(far) and far > near > 0
    with pytest.raises(InputError, match="two queries of each class"):
        fisher_ratio(states, np.ones(20, dtype=bool))


def test_plane_explains_and_separates() -> None:
    apart, mixed = pca_plane(_gaussians(8.0), "norm"), pca_plane(_gaussians(0.0), "norm")
    assert apart.points.shape == (N_TOPICS * PER_TOPIC, 2)
    assert apart.explained[0] > mixed.explained[0] >= mixed.explained[1] > 0
    assert apart.silhouette["text"] > 0.5 > abs(mixed.silhouette["text"]) + 0.3


def test_table_and_figures_go_together(tmp_path: Path) -> None:
    both = _joined(_gaussians(2.0), _gaussians(2.0, "image", seed=1))
    matrix, against = transfer_matrix(both, deals=39), controls(both, deals=39)
    assert (against["p_value"] == 1 / 40).all() and (against["permuted_low"] < 0.5).all()
    assert (against["permuted_high"] > 0.5).all() and against["length"].isna().all() and against["matched"].isna().all()
    table = separability_table(matrix, against, positions="mean")
    assert len(matrix) == 4 and (matrix["p"] < 0.05).all()
    untrained = {"untrained": 0.5, "untrained_low": 0.4, "untrained_high": 0.6}
    assert len(plot_matrix(matrix.assign(positions="mean"), "claim").axes) == 1
    assert len(plot_controls(against.assign(positions="mean", **untrained), "claim").axes) == 2
    assert set(table["measure"]) == {"probe", "transfer", "permuted"}
    assert (table["low"] <= table["high"]).all()
    saved = save_figure(plot_probes(table, "claim"), table, tmp_path / "probes")
    assert saved.exists()
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg", ".csv"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "probes.csv"), table, atol=1e-5, check_dtype=False)
    again = (tmp_path / "probes.svg").read_bytes()
    save_figure(plot_probes(table, "claim"), table, tmp_path / "probes")
    assert (tmp_path / "probes.svg").read_bytes() == again


def test_rates_figure_draws_missing_cells() -> None:
    numbers = {"n": 10, "value": 0.5, "low": 0.2, "high": 0.8}
    rows = [
        {"model": "m", "defense": defense, "attack": attack, "metric": metric, **numbers}
        for defense, attack, metric in (
            ("pretrained", "plain", "attack_success"),
            ("pretrained", "image", "attack_success"),
            ("CASA", "image", "attack_success"),
            ("CASA", "image", "over_refusal"),
        )
    ]
    figure = plot_rates(pd.DataFrame(rows), [("attack_success", "success"), ("over_refusal", "refusal")], "claim")
    assert len(figure.axes) == 2


def test_planes_figure() -> None:
    data = pd.DataFrame(
        {"surface": ["text", "text"], "label": ["harmful", "benign"], "x": [0.0, 1.0], "y": [1.0, 0.0],
         "explained_x": 0.5, "explained_y": 0.2, "silhouette": 0.1, "positions": "last"}
    )  # fmt: skip
    assert len(plot_planes(data, "claim").axes) == 1
