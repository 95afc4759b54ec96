"""How far what a sampler recorded is from what the learner computes on the same tokens."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from tinker import types

_PROMPTS, _PROMPT_TOKENS = 4, 1024
_OTHER_TEMPERATURE = 0.7
_TEXT = "A list of five things that a help desk is asked about, with a short answer to each:"


@dataclass(frozen=True, slots=True)
class Scored:
    """One sampled sequence: prompt and sampled ids, the sampler's logprobs, and the temperature of both."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    temperature: float

    def datum(self) -> types.Datum:
        """What gives the learner's logprobs of all its tokens, at its temperature, in a ``cross_entropy`` pass."""
        from tinker import types

        ids = self.prompt + self.tokens
        rows, start = len(ids) - 1, len(self.prompt) - 1
        temperature = torch.ones(rows)
        temperature[start:] = self.temperature
        weights = torch.zeros(rows)
        weights[start:] = 1.0
        inputs = {"target_tokens": torch.tensor(ids[1:]), "weights": weights, "temperature": temperature}
        return types.Datum(
            model_input=types.ModelInput.from_ints(ids[:-1]),
            loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in inputs.items()},
        )


@dataclass(frozen=True, slots=True)
class Drift:
    """Over ``tokens`` sampled tokens.

    Attributes:
        kl: of the learner's distribution from the sampler's, in nats per token.
        largest: distance of two logprobs of a token, in nats.
    """

    kl: float
    largest: float
    tokens: int

    @classmethod
    def between(cls, scored: Sequence[Scored], learned: Sequence[np.ndarray]) -> Drift:
        """``learned``: the learner's logprobs of each sequence's rows, as ``Scored.datum`` asks for them.

        KL(sampler || learner) is the mean of ``r - 1 - log r``, ``r = p_learner / p_sampler``, over sampled tokens,
        none of which is negative (Schulman's k3, http://joschu.net/blog/kl-approx.html).
        """
        gaps = np.concatenate(
            [
                np.asarray(rows, dtype=np.float64)[len(each.prompt) - 1 :] - np.asarray(each.logprobs, dtype=np.float64)
                for each, rows in zip(scored, learned, strict=True)
            ]
        )
        with np.errstate(over="ignore", invalid="ignore"):
            kl = float(np.mean(np.expm1(gaps) - gaps))
        return cls(kl, float(np.abs(gaps).max()), gaps.size)

    def exceeds(self, most_kl: float) -> bool:
        """Whether it is too much to train on; always, where it is no number."""
        return not (math.isfinite(self.kl) and self.kl <= most_kl)

    def __str__(self) -> str:
        return f"KL {self.kl:.2e} per token, logprobs at most {self.largest:.2e} apart, over {self.tokens} tokens"


class Probes:
    """The prompts that drift is measured on: the last distinct ones that were sampled from.

    Args:
        temperature: of rollouts. Every other probe has another one, at which a sampler that records logprobs from
            before the temperature is found out.
    """

    def __init__(self, tokenizer: Any, temperature: float) -> None:
        first = tokenizer.encode(_TEXT, add_special_tokens=False)
        self._prompts: deque[tuple[int, ...]] = deque([tuple(first)], maxlen=_PROMPTS)
        self.temperatures = (temperature or 1.0, _OTHER_TEMPERATURE if (temperature or 1.0) == 1.0 else 1.0)

    def see(self, prompt: Sequence[int]) -> None:
        """Remember a prompt, its last 1,024 tokens at most."""
        end = tuple(prompt[-_PROMPT_TOKENS:])
        if end not in self._prompts:
            self._prompts.append(end)

    def __iter__(self) -> Any:
        """``(prompt ids, temperature)`` of each sequence to sample."""
        return ((list(prompt), t) for prompt in list(self._prompts) for t in self.temperatures)
