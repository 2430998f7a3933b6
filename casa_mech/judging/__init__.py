"""Judging: verdicts on replies, statistics, the result schema, and the paper's published numbers."""

from casa_mech.judging.agreement import Agreement, agreement, cohen_kappa, krippendorff_alpha
from casa_mech.judging.bootstrap import mean_interval
from casa_mech.judging.compare import COMPARISON_COLUMNS, compare_systems
from casa_mech.judging.judges import KeywordJudge, MicroWorldJudge
from casa_mech.judging.merit import OUTCOME_METRICS, fpr_row, outcome_rows
from casa_mech.judging.mme import MME_COLUMNS, MME_GROUPS, mme_rows, mme_scores
from casa_mech.judging.published import PublishedRate, check_published, published_rates
from casa_mech.judging.refusals import find_refusal
from casa_mech.judging.registry import BACKENDS, JUDGES, load_judge
from casa_mech.judging.results import (
    RESULT_COLUMNS,
    auroc_row,
    rate_row,
    read_table,
    result_table,
    value_row,
    write_table,
)
from casa_mech.judging.rubric_judge import Backend, Completion, RubricJudge
from casa_mech.judging.rubrics import RUBRICS, Rubric, read_rubric
from casa_mech.judging.stats import (
    McNemar,
    auroc,
    auroc_interval,
    cluster_of,
    clusters_of,
    fpr_at_tpr,
    fpr_at_tpr_interval,
    holm,
    mcnemar,
    permutation_test,
    rate_interval,
    wilson,
)
from casa_mech.judging.store import VerdictStore, judge_all
from casa_mech.judging.verdict import UNDECIDED, Judge, JudgeDown, Outcome, Verdict

__all__ = [
    "BACKENDS",
    "COMPARISON_COLUMNS",
    "JUDGES",
    "MME_COLUMNS",
    "MME_GROUPS",
    "OUTCOME_METRICS",
    "RESULT_COLUMNS",
    "RUBRICS",
    "UNDECIDED",
    "Agreement",
    "Backend",
    "Completion",
    "Judge",
    "JudgeDown",
    "KeywordJudge",
    "McNemar",
    "MicroWorldJudge",
    "Outcome",
    "PublishedRate",
    "Rubric",
    "RubricJudge",
    "Verdict",
    "VerdictStore",
    "agreement",
    "auroc",
    "auroc_interval",
    "auroc_row",
    "check_published",
    "cluster_of",
    "clusters_of",
    "cohen_kappa",
    "compare_systems",
    "find_refusal",
    "fpr_at_tpr",
    "fpr_at_tpr_interval",
    "fpr_row",
    "holm",
    "judge_all",
    "krippendorff_alpha",
    "load_judge",
    "mcnemar",
    "mean_interval",
    "mme_rows",
    "mme_scores",
    "outcome_rows",
    "permutation_test",
    "published_rates",
    "rate_interval",
    "rate_row",
    "read_rubric",
    "read_table",
    "result_table",
    "value_row",
    "wilson",
    "write_table",
]
