"""What a run cost: rollouts, tokens, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nat_plugin_evsys.report.metrics_log import BASE, EPOCH, VALIDATION, WARM_START
from nat_plugin_evsys.report.replies import ReplyNumbers
from nat_plugin_evsys.report.verdict import Row
from nat_plugin_evsys.runs.state import RunState


def cost(rows: Sequence[Row], state: RunState) -> dict[str, Any]:
    """Counts of the training rollouts, and what the run's seconds were spent on.

    Returns:
        ``rollouts``, ``calls``, ``trained_calls``, ``sampled_tokens`` (None where no epoch counted them) and
        ``trained_tokens``, all of training rollouts,
        ``steps``, ``seconds`` of the whole run, and ``parts``: ``[[what, seconds], …]``, which add up to it.
    """
    epochs = [row for row in rows if row["event"] == EPOCH]
    sampled = [found for row in epochs if (found := _sampled_tokens(row)) is not None]
    metrics = [(row.get("job") or {}).get("metrics") or {} for row in epochs]
    parts = {
        "warm start": _seconds(rows, WARM_START, "seconds"),
        "rollouts": _seconds(rows, EPOCH, "rollout_seconds"),
        "training": _seconds(rows, EPOCH, "training_seconds"),
        "held-out scoring": _seconds(rows, BASE, "seconds") + _seconds(rows, VALIDATION, "seconds"),
    }
    rest = max(0.0, state.seconds - sum(parts.values()))
    return {
        "rollouts": sum((row.get("rollouts") or 0) + (row.get("extra_rollouts") or 0) for row in epochs),
        "calls": sum(row.get("calls") or 0 for row in epochs),
        "trained_calls": sum(row.get("trained") or 0 for row in epochs),
        "sampled_tokens": round(sum(sampled)) if sampled else None,
        "trained_tokens": round(sum(each.get("sampled_tokens") or 0 for each in metrics)),
        "steps": round(sum(each.get("steps") or 0 for each in metrics)),
        "seconds": state.seconds,
        "parts": [[what, seconds] for what, seconds in [*parts.items(), ("everything else", rest)] if seconds],
    }


def _sampled_tokens(row: Row) -> float | None:
    """Tokens of an epoch's rollouts; where these were not counted, those of the rollouts that its means are about."""
    if (counted := row.get("sampled_tokens")) is not None:
        return float(counted)
    numbers = ReplyNumbers.of_row(row)
    return None if numbers is None else numbers.tokens_mean * numbers.replies


def _seconds(rows: Sequence[Row], event: str, column: str) -> float:
    return sum(row.get(column) or 0.0 for row in rows if row["event"] == event)
