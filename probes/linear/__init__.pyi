from .control_directions import equal_variance_directions, permuted_differences
from .control_task import ControlTask, control_task
from .erasure import Erasure, fit_erasure
from .estimators import (
    PROBES,
    DifferenceInMeans,
    LdaProbe,
    LogisticProbe,
    MahalanobisProbe,
    Probe,
    ProbeKind,
    RidgeProbe,
    fit_batch,
    load_probe,
    save_probe,
)
from .gate_transfer import TransferPrediction, join_points, transfer_prediction
from .harm_and_refusal import Dissociation, contrasts, direction_table, double_dissociation, held_out_coordinates
from .kinds import left_out_kinds
from .mean_differences import mean_difference_table, mean_differences
from .plots import plot_probes
from .refusal_direction import (
    RefusalDirection,
    Selection,
    find_refusal_direction,
    opening_ids,
    refusal_score,
)
from .separability import Plane, controls, fisher_ratio, pca_plane, separability_table, transfer_matrix
from .steering import dose_response, steer
from .thresholds import carried_scores, threshold_table
from .token_probes import TOKEN_PROBES, AttentionProbe, MaxProbe, TokenProbe
from .validation import (
    CrossValidated,
    Folds,
    ProbeControls,
    auroc_of,
    chance_of,
    chance_p,
    cross_validate,
    make_folds,
    matched_auroc,
    probe_controls,
)

__all__ = [
    "ControlTask",
    "control_task",
    "Dissociation",
    "contrasts",
    "direction_table",
    "dose_response",
    "double_dissociation",
    "held_out_coordinates",
    "left_out_kinds",
    "mean_difference_table",
    "mean_differences",
    "carried_scores",
    "threshold_table",
    "PROBES",
    "TOKEN_PROBES",
    "AttentionProbe",
    "MaxProbe",
    "TokenProbe",
    "CrossValidated",
    "DifferenceInMeans",
    "Erasure",
    "Folds",
    "LdaProbe",
    "LogisticProbe",
    "MahalanobisProbe",
    "Plane",
    "Probe",
    "ProbeKind",
    "RefusalDirection",
    "RidgeProbe",
    "Selection",
    "ProbeControls",
    "TransferPrediction",
    "auroc_of",
    "chance_of",
    "chance_p",
    "controls",
    "cross_validate",
    "equal_variance_directions",
    "find_refusal_direction",
    "fisher_ratio",
    "fit_batch",
    "fit_erasure",
    "join_points",
    "load_probe",
    "make_folds",
    "matched_auroc",
    "opening_ids",
    "pca_plane",
    "permuted_differences",
    "plot_probes",
    "refusal_score",
    "steer",
    "save_probe",
    "probe_controls",
    "separability_table",
    "transfer_matrix",
    "transfer_prediction",
]
