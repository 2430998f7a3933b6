"""Notebook 01: tables of the states before CASA, and of probes against gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from casa_mech.casa import Casa, CasaConfig
from casa_mech.evaluation.evaluate import PRETRAINED
from casa_mech.identity import key_digest
from casa_mech.judging import judge_all
from casa_mech.judging.stats import auroc_interval
from casa_mech.omni import GenerationSettings
from casa_mech.organism.premise_rows import PROBE_DEPTH as DEPTH
from casa_mech.study.settings import slug
from casa_mech.study.study import LABELS, ProbePositions, Study
from probes.activations import Activations
from probes.linear.control_task import control_task
from probes.linear.gate_transfer import join_points
from probes.linear.harm_and_refusal import (
    HARM,
    REFUSAL,
    Dissociation,
    contrasts,
    direction_table,
    double_dissociation,
    held_out_coordinates,
)
from probes.linear.kinds import left_out_kinds
from probes.linear.mean_differences import mean_difference_table
from probes.linear.separability import controls, pca_plane, separability_table, transfer_matrix
from probes.linear.thresholds import carried_scores, threshold_table
from probes.linear.validation import cross_validate

Layer = Literal["norm"] | int
"""What a gate reads: behind the final norm, or after a block."""
MEASURES = {"probe": "probe_auroc", "transfer": "transfer_auroc", "permuted": "permuted_auroc"}
TOPICS = "topics alone"
"""Among the kinds that are left out: none, only topics are."""
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


def control_table(states: Sequence[Activations], random_weights: Sequence[Activations], seed: int) -> pd.DataFrame:
    """Controls of the probes at every site, for each choice of positions (column `positions`).

    Beside those of `controls`: `untrained` with its interval, the AUROC of the same probes on the states of the same
    architecture with random weights (`random_weights`, of the same positions as `states`), and of the control task
    (`probes.linear.control_task`) `task, control_task` and `selectivity`, NaN where no topic has two requests.
    """
    tables = []
    for read, untrained in zip(states, random_weights, strict=True):
        beside = pd.concat(
            [_beside(read, untrained, surface, seed) for surface in dict.fromkeys(read.index["surface"])]
        )
        tables.append(controls(read, seed=seed).merge(beside, on=["site", "surface"]).assign(positions=read.positions))
    return pd.concat(tables, ignore_index=True)


def _beside(read: Activations, untrained: Activations, surface: str, seed: int) -> pd.DataFrame:
    there, control = read.where(surface=surface), untrained.where(surface=surface)
    with threadpool_limits(1):
        (probe,) = cross_validate(control.stacked(), control.harmful, control.topics, seed=seed)
        # A control task is on topics that are met in training: there is none where every prompt is its own.
        shared = len(set(there.topics)) < len(there.topics)
        tasks = control_task(there.stacked(), there.harmful, there.topics, seed=seed) if shared else None
    rows = []
    for place, (site, scores) in enumerate(zip(there.sites, probe.scores, strict=True)):
        auroc, low, high = auroc_interval(list(scores), list(control.harmful), list(control.topics), seed).widened()
        rows.append(
            {
                "site": site, "surface": surface, "untrained": auroc, "untrained_low": low, "untrained_high": high,
                "task": tasks.task[place] if tasks else np.nan,
                "control_task": tasks.control[place].mean() if tasks else np.nan,
                "selectivity": tasks.selectivity[place] if tasks else np.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def by_model(study: Study, positions: Sequence[ProbePositions] = ("last", "mean")) -> dict[str, list[Activations]]:
    """States before CASA of every model of the study, by its name, for each choice of positions."""
    return {slug(model): [study.activations(read, model) for read in positions] for model in study.models}


def score_data(states: Mapping[str, Sequence[Activations]], seed: int, site: str = "norm") -> pd.DataFrame:
    """A text probe's score of every request on every surface: those of `carried_scores`, `model, positions`."""
    return _of_each(states, lambda read: carried_scores(read, seed=seed, sites=[site]))


def threshold_data(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What a text probe flags at its own threshold, from `score_data`: the columns of `plots.plot_thresholds`."""
    groups = scores.groupby(["model", "positions"], sort=False)
    tables = [
        threshold_table(rows, seed).assign(model=model, positions=positions) for (model, positions), rows in groups
    ]
    return pd.concat(tables, ignore_index=True)


def kind_data(states: Sequence[Activations], matrix: pd.DataFrame, seed: int, site: str = "norm") -> pd.DataFrame:
    """A text probe on kinds of harm that it has not met, and with topics alone left out (from `matrices`).

    The columns of `left_out_kinds` and `positions`; the kind `TOPICS` stands for unseen topics of seen kinds.
    """
    tables = []
    for read in states:
        with threadpool_limits(1):
            kinds = left_out_kinds(read, seed=seed, sites=[site])
        rows = (matrix["positions"] == read.positions) & (matrix["site"] == site) & (matrix["fit"] == "text")
        topics = matrix[rows].assign(kind=TOPICS)[list(kinds.columns)]
        tables.append(pd.concat([topics, kinds]).assign(positions=read.positions))
    return pd.concat(tables, ignore_index=True)


def difference_data(states: Mapping[str, Sequence[Activations]], seed: int) -> pd.DataFrame:
    """Length and direction of the difference of class means by site and surface: columns of `mean_difference_table`,
    `model, positions`."""
    return _of_each(states, lambda read: mean_difference_table(read, seed=seed))


def _of_each(
    states: Mapping[str, Sequence[Activations]], measure: Callable[[Activations], pd.DataFrame]
) -> pd.DataFrame:
    """`measure` of all states, with the columns `model` and `positions`."""
    with threadpool_limits(1):
        tables = [
            measure(read).assign(model=model, positions=read.positions) for model, own in states.items() for read in own
        ]
    return pd.concat(tables, ignore_index=True)


def own_outcomes(study: Study) -> np.ndarray:
    """Outcomes of the model's own replies to the probing requests before CASA, str [query], in the states' order."""
    settings = GenerationSettings(max_new_tokens=study.sizes.max_new_tokens, batch_size=study.sizes.batch_size)
    key = {**study.model_key(), "n": study.sizes.n_probe, "tokens": settings.max_new_tokens}

    def build() -> pd.DataFrame:
        queries = study.probing_queries()
        with study.without_gate() as omni:
            verdicts = judge_all(study.judge(), queries, omni.generate(queries, settings, progress=study.progress))
        surfaces = [query.meta["surface"] for query in queries]
        ids, outcomes = [query.id for query in queries], [verdict.outcome for verdict in verdicts]
        return pd.DataFrame({"surface": surfaces, "query_id": ids, "outcome": outcomes})

    replies = study.table("analysis", "own-replies", key, build).set_index(["surface", "query_id"])["outcome"]
    index = study.activations().index
    return replies.loc[list(zip(index["surface"], index["query_id"], strict=True))].to_numpy(dtype=str)


def direction_data(states: Sequence[Activations], outcomes: np.ndarray, seed: int) -> pd.DataFrame:
    """Harmfulness and refusal as directions, for each choice of positions: the columns of `direction_table`."""
    return pd.concat(
        [direction_table(read, outcomes, seed).assign(positions=read.positions) for read in states], ignore_index=True
    )


def dissociations(
    user: Activations, header: Activations, outcomes: np.ndarray, seed: int
) -> dict[str, Dissociation | None]:
    """On each surface the harm direction at the user's last token against the refusal direction at the header's.

    Read at `depth_site`; None where a group of requests has fewer than two topics, and so no direction.
    """
    site, by_surface = depth_site(user), {}
    for surface in dict.fromkeys(user.index["surface"]):
        read = {HARM: user.where(surface=surface), REFUSAL: header.where(surface=surface)}
        groups = contrasts(read[HARM].harmful, outcomes[(user.index["surface"] == surface).to_numpy()])
        topics = read[HARM].topics
        coordinates = {name: held_out_coordinates(read[name].at(site), groups[name], topics) for name in read}
        enough = all(np.isfinite(scores).all() for scores in coordinates.values())
        by_surface[surface] = double_dissociation(coordinates, groups, topics, seed) if enough else None
    return by_surface


def depth_site(states: Activations) -> str:
    """The block after which `DEPTH` of the blocks have run: chosen beforehand, where the organisms' cards probe."""
    blocks = [site for site in states.sites if site != "norm"]
    return blocks[round(DEPTH * len(blocks)) - 1]


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
        **study.model_key(model),
        "gate": key_digest({"casa": config.model_dump(mode="json"), "train": settings.model_dump(mode="json")}),
        "examples": sizes.train_examples,
        "n": sizes.n_probe,
    }

    def build() -> pd.DataFrame:
        casa = Casa.attach(study.new_omni(model), config)
        casa.train(study.training_examples(model=model), settings, progress=study.progress)
        tables = [study.read_gate(casa, surface, label) for surface in study.surfaces for label in LABELS]
        return pd.concat(tables, ignore_index=True)

    return study.table("transfer", f"{slug(model)}-{layer}-{steps}", key, build, "readings")


def _gate_aurocs(study: Study, model: str, layer: Layer, steps: int, readings: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for surface, requests in readings.groupby("surface", sort=False):
        harmful, topics = (requests["label"] == "harmful").tolist(), requests["topic"].tolist()
        auroc, low, high = auroc_interval(requests["v_s"].tolist(), harmful, topics, study.settings.seed)
        rows.append({"surface": surface, "auroc": auroc, "low": low, "high": high, "n": len(requests)})
    return pd.DataFrame(rows).assign(model=slug(model), steps=steps, site=str(layer))
