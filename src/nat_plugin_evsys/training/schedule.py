"""What every algorithm's loop is made of: batches in a seeded order, and one optimizer step."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Iterator, Sequence
from typing import TypeVar

from tinker import types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.errors import ConfigError

T = TypeVar("T")


def check_schedule(algorithm: str, epochs: int, batch_size: int, learning_rate: float) -> None:
    """Raises ConfigError unless all three are positive and the learning rate is finite."""
    if epochs < 1 or batch_size < 1 or not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ConfigError(
            f"{algorithm} needs epochs >= 1, batch_size >= 1, learning_rate > 0; "
            f"got {epochs}, {batch_size}, {learning_rate}"
        )


def count_steps(rows: int, epochs: int, batch_size: int) -> int:
    """Batches that ``epoch_batches`` yields."""
    return epochs * math.ceil(rows / batch_size)


def epoch_batches(rows: Sequence[T], epochs: int, batch_size: int, seed: int | str) -> Iterator[tuple[int, list[T]]]:
    """``(epoch from 1, batch)``: all rows once an epoch, shuffled anew by ``seed``; an epoch's last may be smaller."""
    shuffle = random.Random(seed)
    for epoch in range(1, epochs + 1):
        order = list(range(len(rows)))
        shuffle.shuffle(order)
        for start in range(0, len(order), batch_size):
            yield epoch, [rows[i] for i in order[start : start + batch_size]]


async def optimizer_step(
    backend: Backend, forward_backward: Awaitable[types.ForwardBackwardOutput], adam: types.AdamParams
) -> dict[str, float]:
    """Step on a forward_backward that has just been submitted; returns the metrics of both.

    The step is submitted before the forward_backward is awaited, so that the engine never waits for the caller, and a
    cancelled caller leaves no half-done pair behind: where the forward_backward fails or is stopped, nothing has
    accumulated and the step is refused.

    Raises:
        DataError, ConfigError: the backend refuses the Datums or the loss.
        NonFiniteGradientError: the gradient is not finite; the weights are as they were.
    """
    step = backend.optim_step_async(adam)
    output = await forward_backward
    return {**output.metrics, **((await step).metrics or {})}
