"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nat_plugin_evsys.errors import ConfigError

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A linear rise to ``peak`` over the share ``warmup`` of the training, then ``decay`` over what is left.

    For a step that begins at the share x of the training and takes it on by dx, with the share of the decay behind it
    ``y = (x - warmup) / (1 - warmup)``::

        x < warmup   peak * (x + dx) / (warmup + dx)
        constant     peak
        linear       peak * (1 - y)
        cosine       peak * (1 + cos(pi y)) / 2

    Step t (from 1) of T equal steps has x = (t - 1) / T and dx = 1 / T; with ``linear`` and no warm-up that is the
    ``peak * (1 - (t - 1) / T)`` of Tinker's sl_loop. No step runs at a rate of 0.

    Attributes:
        peak: the highest rate.
        decay: by name.
        warmup: share of the training, from 0 to less than 1.
        start, end: the part of the training, from 0 to 1, that ``at_step`` counts the steps of.

    Raises:
        ConfigError: a value is out of range.
    """

    peak: float
    decay: Decay = "constant"
    warmup: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0) or not 0 <= self.warmup < 1:
            raise ConfigError(f"a learning rate needs peak > 0 and 0 <= warmup < 1, got {self.peak}, {self.warmup}")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ConfigError(f"unknown decay `{self.decay}`; it must be constant, linear or cosine")

    def at_step(self, step: int, total: int) -> float:
        """The rate of ``step``, from 1, of the ``total`` equal ones from ``start`` to ``end``."""
        dx = (self.end - self.start) / total
        return self.at(self.start + (step - 1) * dx, dx)

    def at(self, x: float, dx: float) -> float:
        """The rate of a step from the share ``x`` of the training to ``x + dx``."""
        if x < self.warmup:
            return self.peak * min((x + dx) / (self.warmup + dx), 1.0)
        y = (x - self.warmup) / (1 - self.warmup)
        match self.decay:
            case "constant":
                return self.peak
            case "linear":
                return self.peak * (1 - y)
            case "cosine":
                return self.peak * (1 + math.cos(math.pi * y)) / 2
