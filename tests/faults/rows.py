"""One line of JSON for each fault (`pytest -s`): what was done to whom, what it cost, how equal the result is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def told(fault: str, *, lost_steps: int, first_new_step_s: float | None = None, **found: Any) -> None:
    """`fault` says what was done to whom and when; `found` how the result compares with the one without the fault.

    The seconds count from the fault to the first step after it; there are none where nothing had to begin again.
    """
    seconds = None if first_new_step_s is None else round(first_new_step_s, 1)
    print(json.dumps({"fault": fault, "lost_steps": lost_steps, "first_new_step_s": seconds, **found}))


def compared(result: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's result beside that of the same stage without a fault; the model's id is that of its weights."""
    last = [(result["losses"][name]["last"], losses["last"]) for name, losses in reference["losses"].items()]
    return {
        "bit_identical": all(result[name] == reference[name] for name in ("losses", "model_id")),
        "loss_difference": max(abs(found / expected - 1) for found, expected in last),
    }
