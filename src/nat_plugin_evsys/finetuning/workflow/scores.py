"""Whether what an evaluator gave is a score, and which."""

from __future__ import annotations

import math
from typing import Any


def number_of(score: Any) -> float | None:
    """A finite score as a float: Python's numbers (True is 1), numpy's and Decimal; None for anything else."""
    if isinstance(score, str | bytes) or not hasattr(score, "__float__"):
        return None
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def evaluator_problem(score: Any) -> str | None:
    """Why this is not a score, or None. NAT turns an evaluator's exception into score 0.0 with ``reasoning.error``."""
    if score is None:
        return "the evaluator returned nothing for this item, or took longer than evaluator_timeout allows"
    if score.error:
        return str(score.error)
    reasoning = score.reasoning
    if isinstance(reasoning, dict) and str(reasoning.get("error", "")).startswith("Evaluator error"):
        return str(reasoning["error"])
    if number_of(score.score) is None:
        return f"the evaluator's score is {score.score!r}, not a finite number"
    return None
