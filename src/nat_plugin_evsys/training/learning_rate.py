"""The learning rate where none is chosen, and that of each optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.runtime import defaults

if TYPE_CHECKING:
    from nat_plugin_evsys.backends.base import Architecture

Decay = Literal["constant", "linear", "cosine", "wsd"]

_WIDTH = 2000


def default_rate(architecture: Architecture | None) -> float:
    """The rate for LoRA where none is chosen: ``LEARNING_RATE min(1, (2000 / hidden_size) ** p)``, to two digits.

    p is 0.0775 for Qwen's models and 0.781 for others: ``get_lr`` of tinker-cookbook's ``hyperparam_utils``, which has
    the first from Qwen's and the second from Llama's, and gives narrow models more; LOG.md has why they get no more
    here. A model whose width is not known counts as of 2,000.
    """
    if architecture is None:
        return defaults.LEARNING_RATE
    power = 0.0775 if architecture.model_type.startswith("qwen") else 0.781
    factor = min(1.0, (_WIDTH / architecture.hidden_size) ** power)
    return float(f"{defaults.LEARNING_RATE * factor:.2g}")


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
