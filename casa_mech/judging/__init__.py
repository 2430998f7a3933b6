"""Judging: verdicts on replies, statistics, the result schema, and the paper's published numbers."""

from casa_mech.judging.judges import KeywordJudge, MicroWorldJudge
from casa_mech.judging.published import PublishedRate, check_published, published_rates
from casa_mech.judging.refusals import find_refusal
from casa_mech.judging.results import (
    RESULT_COLUMNS,
    auroc_row,
    rate_row,
    read_table,
    result_table,
    value_row,
    write_table,
)
from casa_mech.judging.stats import McNemar, auroc, auroc_interval, cluster_of, holm, mcnemar, wilson
from casa_mech.judging.verdict import Judge, Outcome, Verdict

__all__ = [
    "RESULT_COLUMNS",
    "Judge",
    "KeywordJudge",
    "McNemar",
    "MicroWorldJudge",
    "Outcome",
    "PublishedRate",
    "Verdict",
    "auroc",
    "auroc_interval",
    "auroc_row",
    "check_published",
    "cluster_of",
    "find_refusal",
    "holm",
    "mcnemar",
    "published_rates",
    "rate_row",
    "read_table",
    "result_table",
    "value_row",
    "wilson",
    "write_table",
]
