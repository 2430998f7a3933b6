"""Writes docs/results.md: the text of results.template.md with its tables and numbers from the committed figures.

A place in the template is `{{name}}`, and each name is a key of `places`. `make results` runs this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from casa_mech.omni.checkpoint import WEIGHTS
from casa_mech.organism.card import CARD
from probes.linear.gate_transfer import transfer_prediction

DOCS = Path(__file__).parent
FIGURES = DOCS.parent / "figures"
MODELS = ("organism", "organism-split")
DEFENCES = "defence_grid.csv"
STUDY_ATTACKS = ("plain", "jailbreak", "spelled", "image", "audio", "prefill-12")
"""Of the study's comparison of defences."""
SURFACES = ("plain", "jailbreak", "spelled", "image", "audio", "spoken")
PREFILLS = ("prefill-2", "prefill-4", "prefill-9", "prefill-12")
GRID_ATTACKS = ("plain", "jailbreak", "spelled", "image", "audio", "split", "prefill-4", "prefill-12")
DEFENSES = {
    "none": "none",
    "safety-prompt": "safety prompt",
    "ssft": "SSFT",
    "ssft-token": "SSFT with the token (CASA without attention)",
    "refusal-token": "refusal token",
    "circuit-breaker": "circuit breaker",
    "casa": "**CASA**",
    "casa + safety prompt": "CASA + safety prompt",
    "coca": "CoCA (α = 4)",
    "safecode": "SafeCoDe (paper mode)",
    "moras": "MoRAS",
}
"""Rows of the first organisms' grids."""
NEW_DEFENSES = {
    "casa-scale": "CASA, rule S1 (the paper's equation)",
    "casa-scale-replace": "CASA, trained with S1, v_s alone at inference",
    "casa-mended": "CASA, mended",
    "safecode-code": "SafeCoDe (released code)",
    "any-depth": "any-depth alignment",
}
"""Further rows of the study's comparison."""
AUDIT = "token_audit.csv"
ENDS = ("mean", "low", "high")
READ = 0.5
"""An attack is one that the organism reads where it answers at least this share of its benign counterparts."""


class Rates:
    """Rows of a result table (`value, low, high`) by the values of some of its columns."""

    def __init__(self, table: pd.DataFrame, keys: tuple[str, ...]) -> None:
        self._rows = {tuple(row[key] for key in keys): row for row in table.to_dict("records")}

    def row(self, *key: Any) -> dict[Any, Any]:
        """The row of `key`."""
        return self._rows[key]

    def value(self, *key: Any) -> float:
        """The value of `key`."""
        return float(self._rows[key]["value"])

    def interval(self, *key: Any, digits: int = 1, percent: bool = True) -> str:
        """`value [low, high]` of `key`, in percent or as it is."""
        row, scale = self._rows[key], 100 if percent else 1
        value, low, high = (scale * row[name] for name in ("value", "low", "high"))
        low, high = (min(max(bound, 0.0), float(scale)) for bound in (low, high))
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def percent(self, *key: Any) -> str:
        """The value of `key` in whole percent."""
        return f"{100 * self.value(*key):.0f}"


def read_rates(figures: Path, name: str, *keys: str) -> Rates:
    """The result table `name` of the gallery, by `keys`."""
    return Rates(pd.read_csv(figures / name), keys)


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attack_table(figures: Path) -> str:
    """Success, refusals, benign answers and the gate's AUROC by attack and model."""
    rates = read_rates(figures, "attack_success.csv", "model", "defense", "attack", "metric")
    gate = read_rates(figures, "gate_and_token.csv", "model", "attack", "metric")
    rows: list[tuple[str, ...]] = []
    for model in MODELS:
        for attack in SURFACES:
            answered = [rates.interval(model, system, attack, "benign_answered") for system in ("pretrained", "CASA")]
            rows.append((
                f"`{model}`", attack,
                rates.interval(model, "pretrained", attack, "attack_success"),
                rates.interval(model, "CASA", attack, "attack_success"),
                rates.interval(model, "CASA", attack, "refused"), *answered,
                gate.interval(model, attack, "gate_auroc", digits=2, percent=False),
            ))  # fmt: skip
    head = (
        "model", "attack", "success, pretrained", "success, CASA", "harmful refused, CASA",
        "benign answered, pretrained", "benign answered, CASA", "AUROC of v_s",
    )  # fmt: skip
    return markdown(head, rows)


def prefill_table(figures: Path) -> str:
    """Success under prefills of four lengths, with the gate before and after the prefill."""
    rates = read_rates(figures, "attack_success.csv", "model", "defense", "attack", "metric")
    systems = ("pretrained", "CASA", "CASA, prefill first")
    rows = [
        (attack, *(rates.interval("organism", system, attack, "attack_success") for system in systems))
        for attack in PREFILLS
    ]
    return markdown(("`organism`", "pretrained", "CASA, gate first (A)", "CASA, prefill first (B)"), rows)


def benchmark_table(figures: Path) -> str:
    """Every attack beside its benign counterparts, those that the organism reads best first."""
    rates = read_rates(figures, "attack_benchmarks.csv", "defense", "attack", "metric")
    attacks = pd.read_csv(figures / "attack_benchmarks.csv")["attack"].unique()

    def by_reading(attack: str) -> tuple[float, float]:
        read = rates.value("pretrained", attack, "benign_answered")
        return -read, -rates.value("pretrained", attack, "attack_success")

    rows = []
    for attack in sorted(attacks, key=by_reading):
        n = rates.row("CASA", attack, "attack_success")["n"]
        cells = [
            rates.interval(system, attack, metric, digits=0)
            for metric in ("attack_success", "benign_answered")
            for system in ("pretrained", "CASA")
        ]
        rows.append((attack, str(n), *cells))
    head = (
        "attack", "n harmful", "success, pretrained", "success, CASA",
        "benign answered, pretrained", "benign answered, CASA",
    )  # fmt: skip
    return markdown(head, rows)


def grid_table(figures: Path, model: str) -> str:
    """The comparison of defences on `model`: success by attack, mean, benign answers, the gate's AUROC, time."""
    path = f"grid/compare-{model}-summary.csv"
    rates = read_rates(figures, path, "defense", "metric", "scope")
    table = pd.read_csv(figures / path)
    with_gate = set(table[table["metric"] == "gate_auroc"]["defense"])
    rows = []
    for defense, name in DEFENSES.items():
        rows.append((
            name,
            *(rates.percent(defense, "attack_success", attack) for attack in GRID_ATTACKS),
            rates.interval(defense, "attack_success", "all"), rates.interval(defense, "benign_answered", "all"),
            f"{rates.value(defense, 'gate_auroc', 'all'):.2f}" if defense in with_gate else "–",
            "1" if defense == "none" else f"{rates.value(defense, 'relative_seconds', 'all'):.2f}",
        ))  # fmt: skip
    return markdown(("defence", *GRID_ATTACKS, "mean", "answered", "AUROC", "time"), rows)


def attack_numbers(figures: Path) -> dict[str, str]:
    """The numbers of the findings on transfer, prefills and what the gate knows."""
    rates = read_rates(figures, "attack_success.csv", "model", "defense", "attack", "metric")
    gate = read_rates(figures, "gate_and_token.csv", "model", "attack", "metric")
    before, after = ("organism", "pretrained"), ("organism", "CASA")
    split = ("organism-split", "CASA")
    numbers = {
        "audio_refused": rates.percent(*after, "audio", "refused"),
        "audio_answered_before": rates.percent(*before, "audio", "benign_answered"),
        "audio_answered_after": rates.percent(*after, "audio", "benign_answered"),
        "prefill_success": rates.percent(*after, "prefill-12", "attack_success"),
        "four_before": rates.percent(*before, "prefill-4", "attack_success"),
        "four_after": rates.percent(*after, "prefill-4", "attack_success"),
        "prefill_success_b": rates.percent("organism", "CASA, prefill first", "prefill-12", "attack_success"),
    }
    for attack in ("image", "audio"):
        numbers[f"{attack}_success_before"] = rates.percent(*before, attack, "attack_success")
        numbers[f"{attack}_success_after"] = rates.percent(*after, attack, "attack_success")
        numbers[f"split_{attack}_success"] = rates.percent(*split, attack, "attack_success")
        for name, model, metric in (
            (f"own_{attack}_gate", "organism", "gate_auroc"),
            (f"split_{attack}_gate", "organism-split", "gate_auroc"),
        ):
            numbers[name] = gate.interval(model, attack, metric, digits=2, percent=False)
    for name, model in zip(("own", "split"), MODELS, strict=True):
        scores = [gate.value(model, "image", metric) for metric in ("raw_token_auroc", "gate_auroc", "token_auroc")]
        numbers[f"pair_{name}"] = " / ".join(f"{score:.2f}" for score in scores)
    gains = [gate.row(model, attack, "token_auroc_gain") for model in MODELS for attack in SURFACES]
    numbers["pairs"] = str(len(gains))
    numbers["pair_raised"] = str(sum(gain["low"] > 0 for gain in gains))
    numbers["pair_lowered"] = str(sum(gain["high"] < 0 for gain in gains))
    numbers["table_n"] = str(rates.row(*after, "image", "attack_success")["n"])
    gates = pd.read_csv(figures / "gate_before_after.csv")["gate_seed"].nunique()
    numbers["gates"] = {1: "one", 2: "two", 3: "three", 5: "five"}[gates]
    return numbers


def audit_table(figures: Path) -> str:
    """What the token causes, a row for each attack and label; percent of requests."""
    rates = read_rates(figures, AUDIT, "attack", "label", "measure", "name")
    head = (
        "attack", "requests", "n", "fall", "by the token", "falls apart", "refused, do(unsafe)", "refused, do(safe)",
        "answered, base", "answered, base with a random word", "hard gate, text / surface",
    )  # fmt: skip
    ends = (
        ("refused", "do(unsafe)"), ("refused", "do(safe)"), ("answered", "base"), ("answered", "base, random word"),
    )  # fmt: skip
    rows = []
    cells = pd.read_csv(figures / AUDIT)[["attack", "label", "n"]].drop_duplicates()
    for attack, label, n in cells.itertuples(index=False):
        here = (attack, label)
        part = {name: 100 * rates.value(*here, "fall", name) for name in ("total", "gate", "breakage", "conditioning")}
        hard = (rates.percent(*here, "hard gate", f"calibrated {name}") for name in ("on text", "by surface"))
        ends = (
            ("refused", "do(unsafe)"),
            ("refused", "do(safe)"),
            ("answered", "base"),
            ("answered", "base, random word"),
        )
        rows.append((
            attack, label, str(n),
            *(f"{value:.0f}" for value in (part["total"], part["gate"], part["breakage"] + part["conditioning"])),
            *(rates.percent(*here, *end) for end in ends), " / ".join(hard),
        ))  # fmt: skip
    return markdown(head, rows)


def audit_numbers(figures: Path) -> dict[str, str]:
    """The audit's numbers in the text, in percent and points."""
    rates = read_rates(figures, AUDIT, "attack", "label", "measure", "name")
    surfaces = ("plain", "spelled", "image", "audio")
    base, word = (
        [100 * rates.value(attack, "benign", "answered", name) for attack in surfaces]
        for name in ("base", "base, random word")
    )
    media = {part: 100 * sum(rates.value(attack, "harmful", "fall", part) for attack in ("image", "audio")) / 2
             for part in ("gate", "adapter", "total")}  # fmt: skip
    forced = {
        token: " / ".join(rates.percent(attack, "harmful", "refused", f"do({token})") for attack in surfaces) + " %"
        for token in ("safe", "unsafe", "random word")
    }
    return {
        "base_answered": f"{min(base):.0f}–{max(base):.0f}",
        "base_answered_word": f"{min(word):.0f}–{max(word):.0f}",
        "audit_media_gate": f"{media['gate']:.0f}",
        "audit_media_fall": f"{media['total']:.0f}",
        "audit_media_adapter": f"{media['adapter']:.0f}",
        "audit_safe": forced["safe"],
        "audit_word": forced["random word"],
        "audit_unsafe": forced["unsafe"],
        "audit_benign_unsafe": " / ".join(rates.percent(name, "benign", "refused", "do(unsafe)") for name in surfaces)
        + " %",
        "audit_n": str(rates.row("image", "harmful", "answered", "base")["n"]),
        "prefill_safe": rates.percent("prefill-12", "harmful", "answered", "do(safe)"),
    }


def gates_table(figures: Path) -> str:
    """Share refused, in percent, by gate: a row for each audit in `audit_gates/`, four surfaces in a cell."""
    attacks = ("plain", "spelled", "image", "audio")
    columns = {
        "harmful, own token": ("harmful", "own"),
        "harmful, safe": ("harmful", "do(safe)"),
        "harmful, random word": ("harmful", "do(random word)"),
        "harmful, unsafe": ("harmful", "do(unsafe)"),
        "benign, unsafe": ("benign", "do(unsafe)"),
    }
    lines = ["| gate | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for path in sorted((figures / "audit_gates").glob("*.csv")):
        rates = read_rates(path.parent, path.name, "attack", "label", "intervention", "outcome")
        cells = [
            " / ".join(rates.percent(attack, label, intervention, "refused") for attack in attacks)
            for label, intervention in columns.values()
        ]
        model, _, seed = path.stem.rpartition("-")
        lines.append(f"| `{model}`, seed {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def breaker_sentence(figures: Path) -> str:
    """Whether the training of notebook 05's circuit breakers met its own criterion."""
    row = pd.read_csv(figures / "defence_tradeoff.csv").set_index("defense").loc["circuit-breaker"]
    if row["failed"]:
        return "the rerouting loss has not fallen by half here, so the training counts as failed"
    return "the rerouting loss has fallen by half"


def analysis_numbers(figures: Path) -> dict[str, str]:
    """The numbers of the findings on transfer prediction, patching, calibration, the white box and the judge."""
    found = transfer_prediction(pd.read_csv(figures / "transfer_prediction.csv"), seed=0)
    by_length = pd.read_csv(figures / "prefill_by_length.csv")
    # Figures made before there were benign counterparts are of harmful requests and do not say so.
    harmful = by_length[by_length["label"] == "harmful"] if "label" in by_length else by_length
    lengths = Rates(harmful, ("measure", "system", "length"))
    patching = pd.read_csv(figures / "gate_patching.csv").query(
        "direction == 'insert harm' and surface == 'text' and span == 'header'"
    )
    best = patching.loc[patching["delta_log_odds_mean"].idxmax()]
    within = [f"{slug} {rho:.2f} (p = {p:.2g}, {count} gates)" for slug, (rho, p, count) in found.by_model.items()]
    budget = read_rates(figures, "white_box_budget.csv", "medium", "attacker", "measure", "x")
    steps = pd.read_csv(figures / "white_box_steps.csv")
    suffix = steps[(steps["medium"] == "suffix") & (steps["measure"] == "attack success")]
    suffix = suffix[suffix["attacker"] == "knows the gate"].sort_values("x")
    judged = pd.read_csv(figures / "judge_agreement.csv").query("attack == 'the attacks that it reads'").iloc[0]
    benchmarks = pd.read_csv(figures / "attack_benchmarks.csv").query("metric == 'benign_answered'")
    answered = benchmarks.query("defense == 'pretrained'")["value"]
    turns = benchmarks.query("attack == 'multi-turn'").set_index("defense")["value"]
    return {
        "transfer": f"{found.spearman:.2f} [{found.low:.2f}, {found.high:.2f}]",
        "transfer_n": f"{found.n} points of {found.clusters} gates",
        "transfer_models": " and ".join(within),
        "ssft_prefill_2": lengths.percent("attack success", "SSFT", 2),
        "casa_prefill_2": lengths.percent("attack success", "CASA", 2),
        "unsafe_before_prefill": lengths.percent("given the unsafe token", "decision before the prefill", 12),
        "header_moves": "{:.1f} [{:.1f}, {:.1f}]".format(*(best[f"delta_log_odds_{end}"] for end in ENDS)),
        "header_gap": f"{best['gap_log_odds']:.1f}",
        "header_n": f"{best['n']}",
        "white_known": budget.percent("picture", "knows the gate", "attack success", 8),
        "white_unknown": budget.percent("picture", "does not", "attack success", 8),
        "white_n": str(budget.row("picture", "does not", "attack success", 8)["n"]),
        "suffix_before": f"{100 * suffix['value'].iloc[0]:.0f}",
        "suffix_after": f"{100 * suffix['value'].iloc[-1]:.0f}",
        "turns_before": f"{100 * turns['pretrained']:.0f}",
        "turns_after": f"{100 * turns['CASA']:.0f}",
        "attacks": str(len(answered)),
        "attacks_read": str(int((answered >= READ).sum())),
        "attacks_unread": str(int((answered < READ).sum())),
        "unread_answered": f"{100 * answered[answered < READ].mean():.0f}",
        "keyword_success": f"{100 * judged['success']:.0f}",
        "exact_success": f"{100 * judged['reference']:.0f}",
        "keyword_n": f"{judged['n']:,}",
        "keyword_excess": f"{100 * judged['excess']:.1f} [{100 * judged['low']:.1f}, {100 * judged['high']:.1f}]",
    }


def defence_table(figures: Path) -> str:
    """Attack success of each defence by attack, and benign counterparts answered."""
    rates, table = read_rates(figures, DEFENCES, "defense", "metric", "scope"), pd.read_csv(figures / DEFENCES)
    curve = pd.read_csv(figures / "coca_alpha.csv").query("chosen and defense == 'coca'")
    names = {**DEFENSES, **NEW_DEFENSES, "coca": f"CoCA (α = {curve['alpha'].iloc[0]:g})"}
    rows = [
        (
            names[defense],
            *(rates.percent(defense, "attack_success", attack) for attack in STUDY_ATTACKS),
            rates.interval(defense, "attack_success", "all"),
            rates.interval(defense, "benign_answered", "all"),
        )
        for defense in table["defense"].unique()
    ]
    return markdown(("defence", *STUDY_ATTACKS, "mean", "answered"), rows)


def defence_numbers(figures: Path) -> dict[str, str]:
    """The numbers of the study's comparison of defences in the text."""
    rates = read_rates(figures, DEFENCES, "defense", "metric", "scope")
    numbers = {
        "defence_n": str(rates.row("casa", "attack_success", "plain")["n"]),
    }
    for defense in ("casa", "ssft"):
        media = [rates.percent(defense, "attack_success", attack) for attack in ("spelled", "image", "audio")]
        numbers[f"{defense}_media"] = " / ".join(media)
        numbers[f"{defense}_prefill_now"] = rates.percent(defense, "attack_success", "prefill-12")
    return numbers


def card_numbers() -> dict[str, str]:
    """What the organisms' cards say of the premises that are not met."""
    numbers: dict[str, str] = {}
    for model, name in zip(MODELS, ("own", "split"), strict=True):
        record = json.loads((WEIGHTS / model / CARD).read_text(encoding="utf-8"))
        bound = [row for row in record["premises"] if row["threshold"]]
        missed = [row for row in bound if not row["threshold"][0] <= row["value"] <= row["threshold"][1]]
        numbers |= {f"missed_{name}": str(len(missed)), "thresholds": str(len(bound))}
        if model == "organism":
            rules = [100 * row["value"] for row in bound if row["measure"] == "rules_refused"]
            numbers["rules"] = f"{min(rules):.0f}–{max(rules):.0f}"
    return numbers


def grid_numbers(figures: Path) -> dict[str, str]:
    """What attention adds to the tokens on the first organisms."""
    numbers: dict[str, str] = {}
    for model, name in zip(MODELS, ("own", "split"), strict=True):
        tests = pd.read_csv(figures / "grid" / f"compare-{model}-tests.csv").query(
            "defense == 'ssft-token' and against == 'casa' and metric == 'attack_success' and scope == 'all'"
        )
        row = tests.iloc[0]
        difference, low, high = (-100 * row[key] for key in ("difference", "high", "low"))
        numbers[f"{name}_attention"] = f"{difference:.1f} points [{low:.1f}, {high:.1f}]"
    return numbers


def places(figures: Path = FIGURES) -> dict[str, str]:
    """What stands at each place of the template."""
    tables = {
        "attack_table": attack_table(figures),
        "prefill_table": prefill_table(figures),
        "audit_table": audit_table(figures),
        "gates_table": gates_table(figures),
        "breaker": breaker_sentence(figures),
        "benchmark_table": benchmark_table(figures),
        "defence_table": defence_table(figures),
        "grid_organism": grid_table(figures, "organism"),
        "grid_split": grid_table(figures, "organism-split"),
    }
    numbers = (
        attack_numbers,
        audit_numbers,
        analysis_numbers,
        defence_numbers,
        grid_numbers,
    )
    return tables | card_numbers() | {name: text for part in numbers for name, text in part(figures).items()}


def results_page(template: str, texts: Mapping[str, str]) -> str:
    """The page: `template` with each `{{name}}` replaced.

    Raises:
        KeyError: a place that `texts` does not have.
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda place: texts[place[1]], template)


def main() -> None:
    """Write docs/results.md."""
    template = (DOCS / "results.template.md").read_text(encoding="utf-8")
    (DOCS / "results.md").write_text(results_page(template, places()), encoding="utf-8")


if __name__ == "__main__":
    main()
