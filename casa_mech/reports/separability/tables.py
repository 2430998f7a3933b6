"""Notebook 01: tables of the states before CASA, and of probes against gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from casa_mech.casa import Casa, CasaConfig
from casa_mech.evaluation.evaluate import PRETRAINED
from casa_mech.identity import key_digest
from casa_mech.judging.stats import auroc_interval
from casa_mech.study.settings import slug
from casa_mech.study.study import LABELS, SURFACES, Study
from probes.activations import Activations
from probes.linear.gate_transfer import join_points
from probes.linear.separability import controls, pca_plane, separability_table, transfer_matrix

Layer = Literal["norm"] | int
"""What a gate reads: behind the final norm, or after a block."""
MEASURES = {"probe": "probe_auroc", "transfer": "transfer_auroc", "permuted": "permuted_auroc"}
SHORT = 5
"""The gates of the prediction test, but the study's own, are trained for one in so many of its steps."""


def plane_data(states: Sequence[Activations], site: str = "norm") -> pd.DataFrame:
    """Every query in the PCA plane that all surfaces share: the columns of `plots.plot_planes`."""
    tables = []
    for activations in states:
        plane = pca_plane(activations, site)
        data = activations.index[["query_id", "surface", "label", "topic"]].copy()
        data["x"], data["y"] = plane.points[:, 0], plane.points[:, 1]
        data["explained_x"], data["explained_y"] = plane.explained
        tables.append(data.assign(positions=activations.positions, silhouette=data["surface"].map(plane.silhouette)))
    return pd.concat(tables, ignore_index=True)


def probe_rows(model: str, table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The probe table in the result schema; `attack` holds the layer and positions that were read."""
    return pd.DataFrame(
        {
            "model": model,
            "defense": PRETRAINED,
            "attack": "layer " + table["site"].astype(str) + ", " + table["positions"],
            "surface": table["surface"],
            "label": "both",
            "metric": table["measure"].map(MEASURES),
            "seed": seed,
            "n": table["n"],
            "value": table["auroc"],
            "low": table["low"].clip(upper=table["auroc"]),
            "high": table["high"].clip(lower=table["auroc"]),
        }
    )


def matrices(states: Sequence[Activations], seed: int) -> pd.DataFrame:
    """The transfer matrix at every site, for each choice of positions (column `positions`)."""
    return pd.concat(
        [transfer_matrix(read, seed=seed).assign(positions=read.positions) for read in states], ignore_index=True
    )


def control_table(states: Sequence[Activations], seed: int) -> pd.DataFrame:
    """Controls of the probes at every site, for each choice of positions (column `positions`)."""
    return pd.concat([controls(read, seed=seed).assign(positions=read.positions) for read in states], ignore_index=True)


def probe_table(matrix: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """AUROC of probes by site, with intervals and permuted labels, from `matrices` and `control_table`."""
    tables = [
        separability_table(rows, control[control["positions"] == positions], positions=str(positions))
        for positions, rows in matrix.groupby("positions", sort=False)
    ]
    return pd.concat(tables, ignore_index=True)


def transfer_points(study: Study, positions: Literal["last", "mean"] = "mean", checkpoints: str = "") -> pd.DataFrame:
    """AUROCs of a probe fitted on text and of a gate trained on text, a row a gate and surface.

    Gates: the study's own, and for every layer one trained for a fraction of its steps, on each model of the study; in
    the smoke profile only for the first block and the final norm.

    Args:
        study: the run.
        positions: what the probes read; the mean over the prompt is nearest to what safety attention reads.
        checkpoints: more models, directories separated by commas: other moments of the organism's training.
    """
    probes, gates = [], []
    for model in [*study.models, *(name.strip() for name in checkpoints.split(",") if name.strip())]:
        states = study.activations(positions, model)
        probes.append(transfer_matrix(states, seed=study.settings.seed, deals=0).assign(model=slug(model)))
        few = study.settings.profile == "smoke"
        layers: list[Layer] = ["norm", *(range(1) if few else range(study.omni(model).n_layers))]
        steps = max(1, study.sizes.train_steps // SHORT)
        gates += [_gate_aurocs(study, model, layer, steps, _short_gate(study, model, layer, steps)) for layer in layers]
        if model in study.models:
            own = study.readings(model)
            gates.append(_gate_aurocs(study, model, "norm", study.sizes.train_steps, own[own["moment"] == "after"]))
    return join_points(pd.concat(probes, ignore_index=True), pd.concat(gates, ignore_index=True))


def _short_gate(study: Study, model: str, layer: Layer, steps: int) -> pd.DataFrame:
    """Decisions of a gate at `layer` on the probing requests after `steps` of training on plain text."""
    config = CasaConfig(layer=layer)
    sizes = study.sizes
    settings = study.train_settings.model_copy(update={"max_steps": steps})
    key = {
        "model": study.omni(model).fingerprint(),
        "gate": key_digest({"casa": config.model_dump(mode="json"), "train": settings.model_dump(mode="json")}),
        "examples": sizes.train_examples,
        "n": sizes.n_probe,
        "seed": study.settings.seed,
    }

    def build() -> pd.DataFrame:
        casa = Casa.attach(study.new_omni(model), config)
        casa.train(study.training_examples(), settings, progress=study.progress)
        tables = [study.read_gate(casa, surface, label) for surface in SURFACES for label in LABELS]
        return pd.concat(tables, ignore_index=True)

    return study.table("transfer", f"{slug(model)}-{layer}-{steps}", key, build, "readings")


def _gate_aurocs(study: Study, model: str, layer: Layer, steps: int, readings: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for surface, requests in readings.groupby("surface", sort=False):
        harmful, topics = (requests["label"] == "harmful").tolist(), requests["topic"].tolist()
        auroc, low, high = auroc_interval(requests["v_s"].tolist(), harmful, topics, study.settings.seed)
        rows.append({"surface": surface, "auroc": auroc, "low": low, "high": high, "n": len(requests)})
    return pd.DataFrame(rows).assign(model=slug(model), steps=steps, site=str(layer))
