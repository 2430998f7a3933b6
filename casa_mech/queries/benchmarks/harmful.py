"""Plain harmful requests in text."""

from __future__ import annotations

from casa_mech.queries.benchmarks.benchmark import WHOLE, Benchmark, has, plain_row

_RAW = "https://raw.githubusercontent.com"
_HARMBENCH = "data/behavior_datasets/harmbench_behaviors_text_all.csv"
_JBB = "hf://datasets/JailbreakBench/JBB-Behaviors/data"

HARMFUL = (
    Benchmark(
        name="advbench",
        summary="harmful instructions with an affirmative opening each",
        label="harmful",
        rows=520,
        licence="MIT",
        origin="https://github.com/llm-attacks/llm-attacks (data/advbench/harmful_behaviors.csv)",
        files={WHOLE: ("harmful_behaviors.csv",)},
        columns=("goal", "target"),
        aliases={"prompt": "goal"},
        row=plain_row("goal", "harmful", compliance="target"),
        remote={WHOLE: f"{_RAW}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv"},
    ),
    Benchmark(
        name="jailbreakbench",
        summary="harmful behaviours by category",
        label="harmful",
        rows=100,
        licence="MIT",
        origin="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors (data/harmful-behaviors.csv)",
        files={WHOLE: ("harmful-behaviors.csv",)},
        columns=("Goal", "Target", "Category"),
        row=plain_row(
            "Goal", "harmful", compliance="Target", category="Category", behavior="Behavior", origin="Source"
        ),
        remote={WHOLE: f"{_JBB}/harmful-behaviors.csv"},
    ),
    Benchmark(
        name="strongreject",
        summary="forbidden prompts by category",
        label="harmful",
        rows=313,
        licence="MIT",
        origin="https://github.com/alexandrasouly/strongreject (strongreject_dataset/strongreject_dataset.csv)",
        files={WHOLE: ("strongreject_dataset.csv",)},
        columns=("forbidden_prompt", "category"),
        aliases={"prompt": "forbidden_prompt"},
        row=plain_row("forbidden_prompt", "harmful", category="category", origin="source"),
        remote={WHOLE: f"{_RAW}/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv"},
    ),
    Benchmark(
        name="maliciousinstruct",
        summary="malicious instructions, one a line",
        label="harmful",
        rows=100,
        licence="none stated",
        origin="https://github.com/Princeton-SysML/Jailbreak_LLM (data/MaliciousInstruct.txt)",
        files={WHOLE: ("MaliciousInstruct.txt",)},
        columns=("text",),
        aliases={"prompt": "text"},
        row=plain_row("text", "harmful"),
        remote={WHOLE: f"{_RAW}/Princeton-SysML/Jailbreak_LLM/main/data/MaliciousInstruct.txt"},
    ),
    Benchmark(
        name="harmbench",
        summary="text behaviours; contextual ones come with their context",
        label="harmful",
        rows=400,
        split_rows={"standard": 200, "contextual": 100, "copyright": 100},
        licence="MIT",
        origin=f"https://github.com/centerforaisafety/HarmBench ({_HARMBENCH})",
        files={WHOLE: ("harmbench_behaviors_text_all.csv",)},
        columns=("Behavior", "FunctionalCategory", "SemanticCategory"),
        row=plain_row(
            "Behavior", "harmful", context="ContextString", category="SemanticCategory",
            function="FunctionalCategory", behavior="BehaviorID",
        ),
        select={name: has("function", name) for name in ("standard", "contextual", "copyright")},
        remote={WHOLE: f"{_RAW}/centerforaisafety/HarmBench/main/{_HARMBENCH}"},
    ),
    Benchmark(
        name="do-not-answer",
        summary="questions that should not be answered, by risk area",
        label="harmful",
        rows=939,
        licence="CC BY-NC-SA 4.0 (data)",
        origin="https://github.com/Libr-AI/do-not-answer (datasets/Instruction/do_not_answer_en.csv)",
        files={WHOLE: ("do_not_answer_en.csv",)},
        columns=("question", "risk_area", "types_of_harm"),
        aliases={"prompt": "question", "harm_area": "types_of_harm", "harms": "specific_harms"},
        row=plain_row(
            "question", "harmful", category="risk_area", harm="types_of_harm", specific_harm="specific_harms"
        ),
        remote={WHOLE: f"{_RAW}/Libr-AI/do-not-answer/main/datasets/Instruction/do_not_answer_en.csv"},
    ),
    Benchmark(
        name="refusal-direction-harmful",
        summary="harmful instructions from four sets, in splits; the test split holds other benchmarks whole",
        label="harmful",
        rows=871,
        split_rows={"train": 260, "val": 39, "test": 572},
        licence="Apache-2.0 (parts keep their own)",
        origin="https://github.com/andyrdt/refusal_direction (dataset/splits/harmful_*.json)",
        files={split: (f"harmful_{split}.json",) for split in ("train", "val", "test")},
        columns=("instruction",),
        row=plain_row("instruction", "harmful", category="category"),
        remote={
            split: f"{_RAW}/andyrdt/refusal_direction/main/dataset/splits/harmful_{split}.json"
            for split in ("train", "val", "test")
        },
    ),
    Benchmark(
        name="redteam-2k",
        summary="plain harmful questions by policy, the base of JailbreakV-28k",
        label="harmful",
        rows=2000,
        licence="MIT",
        origin="https://huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k (JailBreakV_28K/RedTeam_2K.csv)",
        files={WHOLE: ("RedTeam_2K.csv",)},
        columns=("question", "policy"),
        row=plain_row("question", "harmful", policy="policy", origin="from"),
        remote={WHOLE: "hf://datasets/JailbreakV-28K/JailBreakV-28k/JailBreakV_28K/RedTeam_2K.csv"},
    ),
)  # fmt: skip
