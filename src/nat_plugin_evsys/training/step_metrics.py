"""Metrics of a job's optimizer steps, and of all of them together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        tokens: Datum tokens.
        sampled_tokens: those with an advantage, or of the replies of preference pairs.
        seconds: forward_backward and optim_step together.
        values: what the backend returned; Tinker's names carry their reduction (``loss:sum``, ``ratio:mean``).
        mean_over: how many things each ``:mean`` is over; None: the sampled tokens.
        normalized: whether ``loss:sum`` was divided already, and is no plain sum over tokens.
    """

    tokens: int
    sampled_tokens: int
    seconds: float
    values: dict[str, float]
    mean_over: int | None = None
    normalized: bool = False


def summarize(history: list[StepMetrics]) -> dict[str, float]:
    """Metrics of all steps, each reduced as its name says; a name without a reduction is averaged over the steps.

    ``name:sum`` is summed, ``:min`` and ``:max`` are extremes, ``:mean`` is weighted by ``mean_over``. Added are
    ``loss_per_token`` (loss:sum over sampled tokens, where it is a sum), tokens, sampled_tokens, steps, seconds and
    tokens_per_second.
    """
    summary: dict[str, float] = {}
    for name in dict.fromkeys(name for step in history for name in step.values):
        steps = [step for step in history if name in step.values]
        summary[name] = _reduced(name.rpartition(":")[2] if ":" in name else "", name, steps)
    seconds = sum(step.seconds for step in history)
    tokens = sum(step.tokens for step in history)
    sampled = sum(step.sampled_tokens for step in history)
    summary |= {"steps": len(history), "tokens": tokens, "sampled_tokens": sampled, "seconds": seconds}
    summary["tokens_per_second"] = tokens / seconds if seconds > 0 else 0.0
    if "loss:sum" in summary and sampled and not any(step.normalized for step in history):
        summary["loss_per_token"] = summary["loss:sum"] / sampled
    return summary


def _reduced(reduction: str, name: str, steps: list[StepMetrics]) -> float:
    values = [step.values[name] for step in steps]
    match reduction:
        case "sum":
            return sum(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "mean":
            weights = [step.sampled_tokens if step.mean_over is None else step.mean_over for step in steps]
            return sum(value * weight for value, weight in zip(values, weights, strict=True)) / max(sum(weights), 1)
        case _:
            return sum(values) / len(values)
