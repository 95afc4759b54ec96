"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nat_plugin_evsys.errors import ConfigError

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A linear rise to ``peak`` over ``warmup`` steps, then ``decay`` over those that are left.

    For step t (from 1) of T, with W warm-up steps and the share ``x = (t - 1 - W) / (T - W)`` of the decay behind it::

        t <= W      peak * t / (W + 1)
        constant    peak
        linear      peak * (1 - x)
        cosine      peak * (1 + cos(pi x)) / 2

    ``linear`` is Tinker's sl_loop; no step runs at a rate of 0.

    Attributes:
        peak: the highest rate.
        decay: by name.
        warmup: optimizer steps.

    Raises:
        ConfigError: a value is out of range.
    """

    peak: float
    decay: Decay = "constant"
    warmup: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0) or self.warmup < 0:
            raise ConfigError(f"a learning rate needs peak > 0 and warmup >= 0, got {self.peak}, {self.warmup}")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ConfigError(f"unknown decay `{self.decay}`; it must be constant, linear or cosine")

    def at(self, step: int, total: int) -> float:
        """The rate of ``step``, from 1, of ``total``; beyond ``total`` that of the last step."""
        if step <= self.warmup:
            return self.peak * step / (self.warmup + 1)
        left = max(total - self.warmup, 1)
        x = min(step - 1 - self.warmup, left - 1) / left
        match self.decay:
            case "constant":
                return self.peak
            case "linear":
                return self.peak * (1 - x)
            case "cosine":
                return self.peak * (1 + math.cos(math.pi * x)) / 2
