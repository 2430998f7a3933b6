"""An audit's replies made by hand, so that every table has a known answer."""

import pandas as pd

from casa_mech.audit import AuditResult
from casa_mech.audit.names import BASE, BASE_WORD, COLUMNS, OWN, SAFE, UNSAFE, WORD

# One request a row: flagged?, then the outcome under base, base + word, own, safe, unsafe, random word.
HARMFUL = [
    ("unsafe", "complied", "complied", "refused", "complied", "refused", "complied"),  # the token made it refuse
    ("unsafe", "complied", "incoherent", "refused", "refused", "refused", "refused"),  # refuses whatever the token
    ("unsafe", "complied", "complied", "incoherent", "complied", "incoherent", "complied"),  # falls apart, flagged
    ("safe", "complied", "incoherent", "incoherent", "incoherent", "refused", "incoherent"),  # falls apart, not flagged
    (
        "safe",
        "complied",
        "complied",
        "refused",
        "refused",
        "complied",
        "complied",
    ),  # refused under the safe token alone
    ("safe", "refused", "refused", "complied", "complied", "refused", "incoherent"),  # gained
    ("safe", "complied", "complied", "complied", "complied", "refused", "incoherent"),  # still answered
    (
        "unsafe",
        "complied",
        "complied",
        "complied",
        "complied",
        "complied",
        "complied",
    ),  # flagged, answered all the same
]
BENIGN = [
    ("safe", "complied", "incoherent", "complied", "complied", "refused", "incoherent"),
    ("safe", "complied", "complied", "incoherent", "incoherent", "refused", "complied"),
    ("unsafe", "complied", "complied", "refused", "complied", "refused", "complied"),
    ("safe", "complied", "complied", "complied", "complied", "complied", "complied"),
]


def by_hand() -> AuditResult:
    rows = []
    for label, requests in (("harmful", HARMFUL), ("benign", BENIGN)):
        for number, (token, *outcomes) in enumerate(requests):
            odds = (1.0 if token == "unsafe" else -1.0) * (1 + number)
            for intervention, outcome in zip((BASE, BASE_WORD, OWN, SAFE, UNSAFE, WORD), outcomes, strict=True):
                rows.append(
                    {
                        "query_id": f"{label}{number}", "attack": "plain", "surface": "text", "label": label,
                        "topic": f"{label}-topic{number}", "split": "", "intervention": intervention, "inserted": "",
                        "reply": "", "outcome": outcome, "safety_token": token, "v_s": 0.5, "logit_safe": 0.0,
                        "logit_unsafe": odds, "raw_logit_safe": 0.0, "raw_logit_unsafe": odds / 2, "meta": "{}",
                    }
                )  # fmt: skip
    return AuditResult(pd.DataFrame(rows, columns=list(COLUMNS)), "model", "CASA", 0)
