"""Notebook 12: its claims, each computed from the audit's replies, requests paired with themselves."""

from __future__ import annotations

import pandas as pd

from casa_mech.audit import AuditResult
from casa_mech.audit.names import BASE, BASE_WORD, OWN, SAFE, UNSAFE
from casa_mech.judging.hypothesis import paired_difference
from casa_mech.reports.claim import Claim
from casa_mech.study import Study

FIGURE = "token_audit"
_TEST = "paired permutation over clusters of requests"


def token_audit_claims(study: Study, result: AuditResult) -> list[Claim]:
    """The claims that the audited labels allow: the first heads the figure.

    On harmful requests what the fall of attack success is made of and what forcing the token does, on benign ones what
    one random word costs the model without its gate.
    """
    harmful, benign = result.requests("harmful"), result.requests("benign")
    claims = [fall_claim(study, harmful), forcing_claim(study, harmful)] if len(harmful) else []
    return claims + ([word_claim(study, benign)] if len(benign) else [])


def fall_claim(study: Study, harmful: pd.DataFrame) -> Claim:
    """Whether the token's refusals or replies that fall apart make up more of the fall of attack success."""
    apart = harmful["conditioning"] + harmful["breakage"]
    gate, fall = harmful["gate"], 100 * harmful["total"].mean()
    return _claim(
        study, harmful, gate, apart,
        f"of {fall:.0f} points of attack success that this gate takes off, its token makes {100 * gate.mean():.0f}, "
        f"broken replies {100 * apart.mean():.0f}",
        f"Attack success goes from {_percent(harmful, f'answered, {BASE}')} to "
        f"{_percent(harmful, f'answered, {OWN}')}; {100 * harmful['adapter'].mean():.0f} points are refused under "
        "either token.",
        "on fresh requests the difference between the two parts has the other sign, or its interval holds 0",
    )  # fmt: skip


def forcing_claim(study: Study, harmful: pd.DataFrame) -> Claim:
    """What the token itself does to refusals, forced on every harmful request."""
    unsafe, safe = (harmful[f"refused, {name}"] for name in (UNSAFE, SAFE))
    return _claim(
        study, harmful, unsafe, safe,
        f"forced to unsafe, this gate refuses {100 * unsafe.mean():.0f} % of harmful requests, forced to safe "
        f"{100 * safe.mean():.0f} %",
        f"By its own choice the gate has {_percent(harmful, f'refused, {OWN}')} refused.",
        "on fresh requests the difference has the other sign, or its interval holds 0",
    )  # fmt: skip


def word_claim(study: Study, benign: pd.DataFrame) -> Claim:
    """What one random word before the reply costs the model without its gate, on benign requests."""
    word, base = (benign[f"answered, {name}"] for name in (BASE_WORD, BASE))
    return _claim(
        study, benign, word, base,
        f"without a gate, one random word takes benign requests answered from {100 * base.mean():.0f} to "
        f"{100 * word.mean():.0f} %",
        f"Behind the gate {_percent(benign, f'answered, {OWN}')} are answered.",
        "on fresh benign requests the change has the other sign, or its interval holds 0",
    )  # fmt: skip


def _claim(
    study: Study, requests: pd.DataFrame, first: pd.Series, second: pd.Series, title: str, detail: str, refuted_if: str
) -> Claim:
    """A claim on the mean of `first` minus `second` over `requests`, each attack weighing as many as it has."""
    difference, p = paired_difference(first, second, requests["cluster"].tolist(), study.settings.seed)
    points = difference.times(100)
    return Claim(
        f"{study.title}: {title}",
        f"Of gate 0 alone (seed {study.gate_seed(0)}); another training may differ. A difference of "
        f"{points.value:+.0f} points {points.bounds('+.0f')}, n = {len(requests)} requests under "
        f"{requests['attack'].nunique()} attacks. {detail}",
        FIGURE, len(requests), *difference, _TEST, p, refuted_if,
    )  # fmt: skip


def _percent(requests: pd.DataFrame, column: str) -> str:
    return f"{100 * requests[column].mean():.0f} %"
