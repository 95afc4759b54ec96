"""Batches in a seeded order."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from nat_plugin_evsys.errors import ConfigError


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


def epoch_batches(rows: int, epochs: int, batch_size: int, seed: int | str) -> Iterator[tuple[int, tuple[int, ...]]]:
    """``(epoch from 1, positions)``: all rows once per epoch, reshuffled by ``seed``; the last batch may be smaller."""
    shuffle = random.Random(seed)
    for epoch in range(1, epochs + 1):
        order = list(range(rows))
        shuffle.shuffle(order)
        for start in range(0, rows, batch_size):
            yield epoch, tuple(order[start : start + batch_size])
