"""Is the training healthy? Each figure of a run over its epochs, with its threshold and what crossing it means.

The figures come from the rows of metrics.jsonl, by their names there. A figure that was not measured is not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.report.diagnosis import CUT_SHARE, ENTROPY_FLOOR, MOVED_FAR, SHRUNK_TO
from nat_plugin_evsys.report.metrics_log import EPOCH
from nat_plugin_evsys.report.prompts import extended_share
from nat_plugin_evsys.report.replies import ReplyNumbers

Row = Mapping[str, Any]
Points = list[tuple[int, float]]
"""``(epoch, value)``, epochs counted from 1."""

State = Literal["ok", "crossed", "not_measured"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound, either as it is or as a multiple of the first epoch's value."""

    side: Literal["above", "below"]
    value: float
    of_first: bool = False

    def bound(self, points: Points) -> float | None:
        """The bound for a run, or None if the first value gives none."""
        if not self.of_first:
            return self.value
        first = points[0][1] if points else 0.0
        return self.value * first if first > 0 else None

    def is_crossed_by(self, value: float, bound: float) -> bool:
        """Whether ``value`` is beyond the bound."""
        return value > bound if self.side == "above" else value < bound


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of health.

    Attributes:
        title: its readable name; ``meaning`` says in a sentence what it is.
        names: its names in a job's metrics, of which the first one present counts; shown if it was not measured.
        read: the value in an epoch's row, for a figure that is not a metric of a job.
        digits: decimals that are shown.
        unit: shown after the value; ``%`` is for shares, which are stored as fractions.
        crossed: what crossing the threshold means, and what to do.
    """

    title: str
    meaning: str
    names: tuple[str, ...]
    read: Callable[[Row], float | None] | None = None
    unit: str = ""
    digits: int = 3
    threshold: Threshold | None = None
    crossed: str = ""

    def value(self, row: Row) -> float | None:
        """The figure in an epoch's row, or None."""
        if self.read is not None:
            return self.read(row)
        metrics = (row.get("job") or {}).get("metrics") or {}
        return next((_number(metrics[name]) for name in self.names if name in metrics), None)


@dataclass(frozen=True, slots=True)
class Health:
    """A figure of a run.

    Attributes:
        points: its value in each epoch that has one.
        bound: the threshold for this run, or None.
        crossed_in: epochs in which it was crossed.
    """

    figure: Figure
    points: Points
    bound: float | None
    crossed_in: list[int]

    @property
    def state(self) -> State:
        """``crossed`` if the last measured epoch crossed the threshold."""
        if not self.points:
            return "not_measured"
        return "crossed" if self.points[-1][0] in self.crossed_in else "ok"


def health(rows: Iterable[Row]) -> list[Health]:
    """Every figure over the epochs of a run's rows of metrics.jsonl, in the order in which the report shows them."""
    epochs = [row for row in rows if row.get("event") == EPOCH]
    return [_over(epochs, figure) for figure in FIGURES]


def _over(epochs: Sequence[Row], figure: Figure) -> Health:
    values = ((int(row["epoch"]), figure.value(row)) for row in epochs)
    points = [(epoch, value) for epoch, value in values if value is not None and math.isfinite(value)]
    threshold = figure.threshold
    bound = None if threshold is None else threshold.bound(points)
    if threshold is None or bound is None:
        return Health(figure, points, bound, [])
    return Health(figure, points, bound, [epoch for epoch, value in points if threshold.is_crossed_by(value, bound)])


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _tokens_per_reply(row: Row) -> float | None:
    numbers = ReplyNumbers.of_row(row)
    return None if numbers is None else numbers.tokens_mean


def _calls_cut(row: Row) -> float | None:
    numbers = ReplyNumbers.of_row(row)
    return None if numbers is None or not numbers.calls else numbers.cut / numbers.calls


def _rows_without_signal(row: Row) -> float | None:
    numbers = ReplyNumbers.of_row(row)
    if numbers is not None and numbers.rows:
        return 1.0 - numbers.rows_with_signal / numbers.rows
    dropped = ((row.get("job") or {}).get("trajectories") or {}).get("dropped") or {}
    lost, rollouts = _number(dropped.get(DropReason.ZERO_VARIANCE_GROUP, 0)), _number(row.get("rollouts"))
    return lost / rollouts if lost is not None and rollouts else None


def _staleness(row: Row) -> float | None:
    ages = row.get("staleness") or {}
    calls = sum(ages.values())
    return sum(int(age) * count for age, count in ages.items()) / calls if calls else None


def _extended(row: Row) -> float | None:
    return extended_share(row.get("prompts") or {})


def _malformed(row: Row) -> float | None:
    calls, malformed = _number(row.get("calls")), _number(row.get("malformed_calls"))
    return None if not calls or malformed is None else malformed / calls


def _failed(row: Row) -> float | None:
    rollouts, failed = _number(row.get("rollouts")), _number(row.get("failed_rollouts"))
    return None if not rollouts or failed is None else failed / rollouts


FIGURES: tuple[Figure, ...] = (
    Figure(
        "Rows without a signal",
        "Share of the rows whose attempts all got the same reward. Nothing can be learned from them, unless "
        "`discount` or step rewards make their calls differ, or `failed_groups` is `batch_mean`.",
        ("replies.rows_with_signal",),
        _rows_without_signal,
        "%",
        0,
        Threshold("above", 0.8),
        "Hardly any row teaches anything. Rows that are always solved can be replaced by harder ones; for rows that "
        "never are, raise num_generations, start with a warm_start, or reward partial success.",
    ),
    Figure(
        "Reply length",
        "Sampled tokens of one attempt, on average.",
        ("replies.tokens_mean",),
        _tokens_per_reply,
        "tokens",
        1,
        Threshold("below", SHRUNK_TO, of_first=True),
        "The replies have shrunk to a fraction of what they were: check that they still say what you want.",
    ),
    Figure(
        "Replies cut off",
        "Share of the LLM calls that ended at max_tokens, in the middle of a reply.",
        ("replies.cut",),
        _calls_cut,
        "%",
        0,
        Threshold("above", CUT_SHARE),
        "Many replies are judged before they are finished: raise the policy's max_tokens, or ask for shorter replies.",
    ),
    Figure(
        "Failed rollouts",
        "Share of the rollouts in which the workflow raised, or that got no reward.",
        ("failed_rollouts",),
        _failed,
        "%",
        0,
        Threshold("above", 0.05),
        "Look at the errors of this epoch in section 3: a broken tool teaches the policy nothing.",
    ),
    Figure(
        "Malformed tool calls",
        "Blocks that looked like a tool call, could not be read as one, and stayed text, for each LLM call.",
        ("malformed_calls",),
        _malformed,
        digits=2,
        threshold=Threshold("above", 0.2),
        crossed="The policy writes calls that nobody can read: look at its replies, and start with a warm_start on "
        "calls in the form of its chat template.",
    ),
    Figure(
        "KL to the base model",
        "How far the policy has moved from the model it started as, in nats per token.",
        ("kl_base:mean", "kl_ref:mean", "base_kl:mean"),
        threshold=Threshold("above", 0.5),
        crossed="The policy has moved far from the base model, and may have forgotten what it knew: lower "
        "learning_rate, set kl_beta, or serve an earlier checkpoint.",
    ),
    Figure(
        "KL to the sampler",
        "How far the policy moved, within the epoch, from the one that sampled the replies, in nats per token.",
        ("kl_v1:mean",),
        threshold=Threshold("above", 0.15),
        crossed="The replies were sampled by a policy that is too different from the one they train: lower "
        "learning_rate, take fewer steps an epoch (raise groups_per_step), or choose loss_fn ppo.",
    ),
    Figure(
        "Moved by an epoch",
        "How far an epoch moved the policy, in nats per token; `target_kl` adapts the learning rate to it.",
        ("kl_moved",),
        threshold=Threshold("above", MOVED_FAR),
        crossed="An epoch's steps made the policy another one: lower learning_rate.",
    ),
    Figure(
        "Learning rate",
        "What the steps ran at: `learning_rate` with its warm-up, `lr_schedule`, `lr_factor` and `lr_scaling`.",
        ("learning_rate",),
        digits=7,
    ),
    Figure(
        "Largest ratio",
        "The largest factor by which any trained token became more likely than when it was sampled.",
        ("ratio:max",),
        digits=2,
        threshold=Threshold("above", 5.0),
        crossed="Single tokens dominate the step: choose loss_fn ppo or cispo, which limit the ratio, or lower "
        "learning_rate.",
    ),
    Figure(
        "Clipped tokens",
        "Share of the trained tokens whose ratio the loss clipped.",
        ("clip_fraction:mean",),
        unit="%",
        digits=0,
        threshold=Threshold("above", 0.3),
        crossed="Much of the batch no longer counts: the policy moved too far in one epoch. Lower learning_rate.",
    ),
    Figure(
        "Entropy",
        "How undecided the policy is about its next token, in nats; at 0 it always says the same thing.",
        ("entropy:mean",),
        threshold=Threshold("below", ENTROPY_FLOOR, of_first=True),
        crossed="The policy has nearly stopped trying alternatives, so it can find nothing better: lower "
        "learning_rate, raise temperature, or stop here if the reward is what you want.",
    ),
    Figure(
        "Gradient norm",
        "Norm of the gradient before clipping; distrust a step with a sudden jump.",
        ("grad_norm", "grad_norm:mean"),
        digits=2,
        threshold=Threshold("above", 20.0, of_first=True),
        crossed="The gradient has grown by more than an order of magnitude: lower learning_rate, and "
        "make sure that grad_clip_norm is not 0.",
    ),
    Figure(
        "Staleness",
        "Policy versions between sampling a reply and training on it, on average; 0 is on-policy.",
        ("staleness",),
        _staleness,
        digits=2,
        threshold=Threshold("above", 2.0),
        crossed="Replies are old when they are trained on; without overlap_rollouts they never are.",
    ),
    Figure(
        "Turns read as sampled",
        "Share of the prompts of later turns that start with the recorded token ids of the turn before.",
        ("prompts.extended",),
        _extended,
        "%",
        0,
        Threshold("below", 0.9),
        "Earlier turns are tokenised again, which costs time and lets the policy read what it did not write. `prompts` "
        "in metrics.jsonl says why: the agent changes replies (`changed`), or the chat template does (`rewritten`).",
    ),
    Figure(
        "Training speed",
        "Tokens trained on per second.",
        ("tokens_per_second",),
        unit="tokens/s",
        digits=0,
        threshold=Threshold("below", 0.3, of_first=True),
        crossed="Training is much slower than in the first epoch: look for other load, or for a shortage of memory.",
    ),
)
"""In the order of the report: what a person should look at first comes first."""
