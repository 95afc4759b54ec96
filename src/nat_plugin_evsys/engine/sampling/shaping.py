"""What a request changes of its logits before a token is drawn, in vLLM's order.

1. tokens are ruled out: those that a bias of -100 bans, and those that end a sequence among the first ``min_tokens``;
2. ``logit_bias``: ``z_i + b_i``;
3. the repetition penalty r: of each token i of the prompt or the sequence, ``z_i / r`` where positive, else ``z_i r``
   (CTRL, arXiv 1909.05858, section 4.1);
4. of each token that was sampled c times, ``z_i - frequency_penalty c - presence_penalty`` (OpenAI's).

Temperature, min_p, top_k and top_p follow; see ``decoding``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nat_plugin_evsys.engine.sampling.params import BANNED, LARGEST_BIAS, extensions_of
from nat_plugin_evsys.errors import DataError

_LARGEST_PENALTY = 1e20
"""So large that, times a context of tokens and over the least temperature, logits stay within fp32."""


@dataclass(frozen=True, eq=False)
class Shaping:
    """Of one request.

    Attributes:
        bias_ids, bias: (K,) int64 and float32, without the bans.
        repetition, frequency, presence: the penalties; 1, 0 and 0 are off.
        min_p: the least share of the likeliest token's probability; 0 is off.
        min_tokens: before this many tokens ``early`` holds, from then on ``late``.
        early, late: bool (V,), the tokens that may come; None where all may.
    """

    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    repetition: float
    frequency: float
    presence: float
    min_p: float
    min_tokens: int
    early: NDArray[np.bool_] | None
    late: NDArray[np.bool_] | None

    @classmethod
    def of(cls, params: Any, ends: Iterable[int], vocab_size: int, never: Iterable[int] = ()) -> Shaping | None:
        """What Tinker's sampling parameters ask for, with this package's extensions; None if that is nothing.

        Args:
            ends: ids that end a sequence.
            never: ids that are not drawn in any case.

        Raises:
            DataError: a parameter is out of range, or no token is left to draw.
        """
        asked = extensions_of(params)
        if not asked:
            return None
        bias = _checked_bias(asked.get("logit_bias") or {}, vocab_size)
        banned = [token for token, value in bias.items() if value <= BANNED]
        added = {token: value for token, value in bias.items() if value > BANNED}
        late = _all_but([*banned, *never], vocab_size) if banned else None
        if late is not None and not late.any():
            raise DataError("logit_bias bans every token; leave at least one")
        min_tokens = _checked_min_tokens(asked.get("min_tokens", 0), params.max_tokens)
        early = _all_but([*banned, *ends, *never], vocab_size) if min_tokens else late
        if early is not None and not early.any():
            raise DataError(
                f"min_tokens is {min_tokens}, and logit_bias bans every token that does not end the sequence; leave at "
                "least one"
            )
        return cls(
            bias_ids=np.array(list(added), dtype=np.int64),
            bias=np.array(list(added.values()), dtype=np.float32),
            repetition=_factor("repetition_penalty", asked.get("repetition_penalty", 1.0)),
            frequency=_addend("frequency_penalty", asked.get("frequency_penalty", 0.0)),
            presence=_addend("presence_penalty", asked.get("presence_penalty", 0.0)),
            min_p=_share("min_p", asked.get("min_p", 0.0)),
            min_tokens=min_tokens,
            early=early,
            late=late,
        )

    @property
    def moves(self) -> bool:
        """Whether ``shaped`` has anything to do."""
        return bool(self.bias_ids.size) or self.counts

    @property
    def counts(self) -> bool:
        """Whether there is a penalty, so that tokens are counted."""
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)

    @property
    def masks(self) -> bool:
        """Whether a token is ever ruled out."""
        return self.early is not None

    def allowed(self, sampled: int) -> NDArray[np.bool_] | None:
        """The tokens (V,) that may come after ``sampled`` others; None if all may."""
        return self.early if sampled < self.min_tokens else self.late

    def seen(self, prompt: Sequence[int]) -> SeenTokens | None:
        """The counts of a new sequence; None if none are needed."""
        if not self.counts:
            return None
        return SeenTokens(prompt if self.repetition != 1.0 else ())


class SeenTokens:
    """The distinct tokens that penalties are about.

    Attributes:
        ids: (N,) int64.
        sampled: (N,) float32, how often each was sampled; 0 if it is of the prompt only.
    """

    __slots__ = ("_at", "ids", "sampled")

    def __init__(self, prompt: Iterable[int]) -> None:
        known = sorted(set(prompt))
        self._at = {token: at for at, token in enumerate(known)}
        self.ids = np.array(known, dtype=np.int64)
        self.sampled = np.zeros(len(known), dtype=np.float32)

    def add(self, token: int) -> None:
        """Count a sampled token."""
        at = self._at.setdefault(token, len(self._at))
        if at == len(self.ids):
            self.ids, self.sampled = np.append(self.ids, token), np.append(self.sampled, np.float32(0))
        self.sampled[at] += 1


def shaped(logits: Tensor, rows: Sequence[tuple[int, Shaping, SeenTokens | None]]) -> Tensor:
    """``logits`` (B, V) with the bias and the penalties of some ``(row, shaping, seen tokens)``, as new fp32 (B, V)."""
    z = logits.to(torch.float32, copy=True)
    biased = [(row, s) for row, s, _ in rows if s.bias_ids.size]
    if biased:
        ids = np.concatenate([s.bias_ids for _, s in biased])
        at = (_each([row for row, _ in biased], [s.bias_ids.size for _, s in biased], z), _on(ids, z))
        z[at] = z[at] + _on(np.concatenate([s.bias for _, s in biased]), z)
    counted = [(row, s, seen) for row, s, seen in rows if seen is not None and seen.ids.size]
    if counted:
        sizes = [seen.ids.size for _, _, seen in counted]
        at = (_each([row for row, _, _ in counted], sizes, z), _on(np.concatenate([n.ids for _, _, n in counted]), z))
        repetition = _each([s.repetition for _, s, _ in counted], sizes, z)
        frequency = _each([s.frequency for _, s, _ in counted], sizes, z)
        presence = _each([s.presence for _, s, _ in counted], sizes, z)
        sampled = _on(np.concatenate([seen.sampled for _, _, seen in counted]), z)
        values = z[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        z[at] = values - frequency * sampled - presence * (sampled > 0)
    return z


def _each(values: Sequence[float], sizes: Sequence[int], like: Tensor) -> Tensor:
    """Each value as often as its size says."""
    return _on(np.repeat(np.array(values, dtype=np.int64 if isinstance(values[0], int) else np.float32), sizes), like)


def _on(values: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def _all_but(ids: Iterable[int], vocab_size: int) -> NDArray[np.bool_]:
    allowed = np.ones(vocab_size, dtype=bool)
    allowed[list(ids)] = False
    return allowed


def _checked_bias(bias: Any, vocab_size: int) -> dict[int, float]:
    for token, value in bias.items():
        if not 0 <= token < vocab_size:
            raise DataError(f"logit_bias has token id {token}, outside the vocabulary of {vocab_size} tokens")
        if not math.isfinite(value) or abs(value) > LARGEST_BIAS:
            raise DataError(
                f"logit_bias must lie between {BANNED:g} (ban) and {LARGEST_BIAS:g}, got {value} for token id {token}"
            )
    return dict(bias)


def _checked_min_tokens(min_tokens: int, max_tokens: int | None) -> int:
    if min_tokens < 0 or (max_tokens is not None and min_tokens > max_tokens):
        raise DataError(f"min_tokens must lie between 0 and max_tokens, got {min_tokens} of at most {max_tokens}")
    return int(min_tokens)


def _factor(name: str, value: float) -> float:
    if not 1 / _LARGEST_PENALTY <= value <= _LARGEST_PENALTY:
        raise DataError(f"{name} must be a positive number (1 is off) up to {_LARGEST_PENALTY:g}, got {float(value)}")
    return float(value)


def _addend(name: str, value: float) -> float:
    if not abs(value) <= _LARGEST_PENALTY:
        raise DataError(f"{name} must be a number (0 is off) up to {_LARGEST_PENALTY:g}, got {float(value)}")
    return float(value)


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise DataError(f"{name} must lie between 0 (off) and 1, got {value}")
    return float(value)
