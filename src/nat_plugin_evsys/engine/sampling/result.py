"""What a sampling request answers with: Tinker's types and what this engine adds to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tinker import types
from tinker.types.topk_logprobs import MASK_LOGPROB


class FieldAccess:
    """Lets a result's public attributes be read as a dict's items too: ``result["tokens"]``. *Extension.*"""

    def __getitem__(self, key: str) -> Any:
        if not isinstance(key, str) or key.startswith("_") or callable(getattr(type(self), key, None)):
            raise KeyError(key)
        try:
            return getattr(self, key)
        except AttributeError:
            raise KeyError(key) from None

    def get(self, key: str, default: Any = None) -> Any:
        """The item, or ``default`` where there is none."""
        try:
            return self[key]
        except KeyError:
            return default


@dataclass(frozen=True)
class SampledSequence(FieldAccess, types.SampledSequence):
    """Tinker's sampled sequence, and its text."""

    decode: Callable[[list[int]], str] | None = field(default=None, repr=False, compare=False, kw_only=True)

    @cached_property
    def text(self) -> str:
        """The decoded tokens without special tokens; a stop string, being part of ``tokens``, is in it. *Extension.*"""
        return self.decode(self.tokens) if self.decode is not None else ""


@dataclass(frozen=True)
class SampleResult(FieldAccess, types.SampleResponse):
    """Tinker's sample response, and the policy version that every sequence in it was sampled from. *Extension.*"""

    policy_version: int = field(kw_only=True)


def top_columns(logprobs: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row of ``logprobs`` (N, V): ids int32 and logprobs float32, (N, k) each, in falling order.

    Where fewer than k tokens have any probability (top_k or top_p dropped the rest), Tinker's sentinels fill up.
    """
    values, ids = logprobs.topk(k, dim=-1)
    absent = values == float("-inf")
    return (
        ids.masked_fill(absent, 0).to(torch.int32).cpu().numpy(),
        values.masked_fill(absent, MASK_LOGPROB).float().cpu().numpy(),
    )
