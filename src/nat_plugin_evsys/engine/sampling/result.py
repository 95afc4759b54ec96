"""The answer to a sampling request: Tinker's types and this engine's additions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from tinker import types
from tinker.types.topk_logprobs import MASK_LOGPROB


class FieldAccess:
    """Makes a result readable as a mapping too: ``result["tokens"]``, ``list(result)`` … *Extension.*

    The keys are ``KEYS``; any other public attribute can be read by its name as well. A ``collections.abc.Mapping``,
    though not by inheritance, which would bring another ``__eq__``.
    """

    KEYS: ClassVar[tuple[str, ...]] = ()

    def __getitem__(self, key: str) -> Any:
        if not isinstance(key, str) or key.startswith("_") or key == "KEYS" or callable(getattr(type(self), key, None)):
            raise KeyError(key)
        try:
            return getattr(self, key)
        except AttributeError:
            raise KeyError(key) from None

    def get(self, key: str, default: Any = None) -> Any:
        """The item, or ``default`` if there is none."""
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        return key in self.KEYS

    def __iter__(self) -> Iterator[str]:
        return iter(self.KEYS)

    def __len__(self) -> int:
        return len(self.KEYS)

    def keys(self) -> KeysView[str]:
        """The names in ``KEYS``."""
        return dict.fromkeys(self.KEYS).keys()

    def values(self) -> list[Any]:
        """Their values."""
        return [self[key] for key in self.KEYS]

    def items(self) -> list[tuple[str, Any]]:
        """Both."""
        return [(key, self[key]) for key in self.KEYS]


Mapping.register(FieldAccess)


@dataclass(frozen=True)
class SampledSequence(FieldAccess, types.SampledSequence):
    """Tinker's sampled sequence, and its text."""

    KEYS: ClassVar[tuple[str, ...]] = ("tokens", "text", "logprobs", "stop_reason")

    decode: Callable[[list[int]], str] | None = field(default=None, repr=False, compare=False, kw_only=True)

    @cached_property
    def text(self) -> str:
        """The decoded tokens without special tokens; a stop string, being part of ``tokens``, is in it. *Extension.*"""
        return self.decode(self.tokens) if self.decode is not None else ""


@dataclass(frozen=True)
class SampleResult(FieldAccess, types.SampleResponse):
    """Tinker's sample response, and the policy version that every sequence in it was sampled from. *Extension.*"""

    KEYS: ClassVar[tuple[str, ...]] = ("sequences", "policy_version", "prompt_logprobs", "topk_prompt_logprobs")

    policy_version: int = field(kw_only=True)

    def decoded_by(self, decode: Callable[[list[int]], str] | None) -> SampleResult:
        """A copy whose sequences have their ``text`` from ``decode``: without it, none refers to a tokenizer."""
        sequences: list[types.SampledSequence] = []
        for sequence in self.sequences:
            assert isinstance(sequence, SampledSequence)
            sequences.append(replace(sequence, decode=decode))
        return replace(self, sequences=sequences)


def top_columns(logprobs: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row of ``logprobs`` (N, V): ids int32 and logprobs float32, (N, k) each, in falling order.

    If fewer than k tokens have any probability (top_k or top_p dropped the rest), Tinker's sentinels fill the rest.
    """
    values, ids = logprobs.topk(k, dim=-1)
    absent = values == float("-inf")
    return (
        ids.masked_fill(absent, 0).to(torch.int32).cpu().numpy(),
        values.masked_fill(absent, MASK_LOGPROB).float().cpu().numpy(),
    )
