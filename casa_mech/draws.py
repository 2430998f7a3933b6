"""`Draw`: the purposes that requests are drawn for, each with seeds of its own."""

from __future__ import annotations

from enum import IntEnum


class Draw(IntEnum):
    """What is added to a study's seed before requests are drawn, by purpose.

    Purposes lie a thousand apart, so that the seeds 0 to 999 give draws that none of them shares; a number that was
    used once is not given to another purpose.
    """

    TRAINING = 1_000
    """Examples that gates and trained defences learn from."""
    EVALUATION = 2_000
    """Requests that are answered and judged: the attack table, the benchmarks, the comparison."""
    PROBING = 3_000
    """Requests whose states and v_s are read, before and after training."""
    GATE_DIRECTIONS = 4_000
    """Requests that the refusal direction and the gate's directions are found on."""
    GATE_MEASUREMENT = 5_000
    """Requests that safety attention is watched, patched and ablated on."""
    PREFILL_MEASUREMENT = 6_000
    """Requests that are answered under a prefill."""
    PREFILL_AXES = 7_000
    """Requests that the axes of refusal under a prefill are fitted on."""
    LENS_MEASUREMENT = 8_000
    """Requests that the lenses and the heads are judged on."""
    LENS_TRANSLATORS = 9_000
    """Requests that the tuned lens's translators are fitted on."""
    WHITE_BOX = 11_000
    """Requests that are attacked with the model's gradients; harmful ones alone."""
    CALIBRATION = 22_000
    """Requests that a trained gate is calibrated on."""
    PROBE_TRAINING = 23_000
    """Prompts of the training sets that a probe is fitted on, to be judged on several benign sets."""


BENIGN = 10_000
"""Added for benign requests where the two labels are drawn apart: no request has then a counterpart of its wording."""
