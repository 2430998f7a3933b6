"""Judging: verdicts on replies and where they are kept, agreement with people, and tables of results.

The statistics are in modules of their own: `stats` (rates, AUROCs and their intervals), `bootstrap`, `hypothesis`
(paired tests, permutations, Holm's correction), `merit` (the rates of a table of replies), `mme` and `published`.
"""

from casa_mech.judging.agreement import agreement
from casa_mech.judging.judges import KeywordJudge, MicroWorldJudge
from casa_mech.judging.registry import JUDGES, load_judge
from casa_mech.judging.results import read_table, write_table
from casa_mech.judging.rubric_judge import RubricJudge
from casa_mech.judging.rubrics import RUBRICS, Rubric, read_rubric
from casa_mech.judging.store import VerdictStore, judge_all
from casa_mech.judging.verdict import Judge, Outcome, Verdict

__all__ = [
    "JUDGES",
    "RUBRICS",
    "Judge",
    "KeywordJudge",
    "MicroWorldJudge",
    "Outcome",
    "Rubric",
    "RubricJudge",
    "Verdict",
    "VerdictStore",
    "agreement",
    "judge_all",
    "load_judge",
    "read_rubric",
    "read_table",
    "write_table",
]
