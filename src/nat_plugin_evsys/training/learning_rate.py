"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from nat_plugin_evsys.errors import ConfigError

Decay = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True, slots=True)
class LearningRate:
    """How the rate falls over the training. For a step that begins at the share x of it::

        constant     peak
        linear       peak * (1 - x)
        cosine       peak * (1 + cos(pi x)) / 2
        wsd          peak * min(1, 2 (1 - x))

    The last is warmup-stable-decay (MiniCPM, arXiv 2404.06395): constant for half of the training, then linear.
    Step t (from 1) of T equal steps has x = (t - 1) / T; with ``linear`` that is the ``peak * (1 - (t - 1) / T)`` of
    Tinker's sl_loop. No step runs at a rate of 0. The rise at the start is ``StepSize``'s.

    Attributes:
        peak: the highest rate.
        decay: by name.
        start, end: the part of the training, from 0 to 1, that ``at_step`` counts the steps of.

    Raises:
        ConfigError: a value is out of range.
    """

    peak: float
    decay: Decay = "constant"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ConfigError(f"a learning rate needs peak > 0, got {self.peak}")
        if self.decay not in get_args(Decay):
            raise ConfigError(f"unknown decay `{self.decay}`; it must be one of {', '.join(get_args(Decay))}")

    def at_step(self, step: int, total: int) -> float:
        """The rate of ``step``, from 1, of the ``total`` equal ones from ``start`` to ``end``."""
        x = self.start + (step - 1) * (self.end - self.start) / total
        match self.decay:
            case "constant":
                return self.peak
            case "linear":
                return self.peak * (1 - x)
            case "cosine":
                return self.peak * (1 + math.cos(math.pi * x)) / 2
            case "wsd":
                return self.peak * min(1.0, 2 * (1 - x))
