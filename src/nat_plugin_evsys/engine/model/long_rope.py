"""LongRoPE (arXiv 2402.13753): one rotary table up to a limit, another beyond it, each sequence by its own length.

transformers chooses one table for a whole batch, by its largest position, and writes it into the module that all
threads share. ``install`` puts a ``LongRotary`` in its place, which chooses for each row and keeps no state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LENGTHS: ContextVar[Tensor | None] = ContextVar("evsys_sequence_lengths", default=None)


@contextmanager
def sequence_lengths(lengths: Tensor) -> Iterator[None]:
    """Passes inside the ``with`` block, in this thread or task, are over rows of sequences this long: (rows,) int64.

    Needed where a pass holds padding, or a part of a sequence only. Elsewhere a row is as long as its largest position
    says.
    """
    token = _LENGTHS.set(lengths)
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def long_rope_limit(model: PreTrainedModel) -> int | None:
    """Tokens up to which a sequence has the short table; None where the model's table never changes."""
    limits = [module.limit for module in model.modules() if isinstance(module, LongRotary)]
    return min(limits, default=None)


def rope_types(config: PretrainedConfig) -> set[str | None]:
    """The ``rope_type`` of a text model's rotary embedding, or of each where its layers have several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return {each.get("rope_type") for each in (parameters, *parameters.values()) if isinstance(each, dict)}


def install(model: PreTrainedModel) -> None:
    """Let every LongRoPE module of ``model`` choose its table by row. Idempotent."""
    for name, module in list(model.named_modules()):
        if getattr(module, "rope_type", None) == "longrope":
            model.set_submodule(name, LongRotary(module))


class LongRotary(nn.Module):
    """transformers' rotary module, once with the short table and once with the long one.

    Attributes:
        limit: tokens up to which a sequence has the short table.
        original: transformers' module.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        parameters = module.config.rope_parameters
        self.original = module
        self.limit = int(parameters["original_max_position_embeddings"])
        device = module.original_inv_freq.device
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=self.limit + 1)
        self.short = _fixed(module, module.original_inv_freq)
        self.long = _fixed(module, long)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``(cos, sin)`` [rows, T, dim], or [1, T, dim] if ``position_ids`` [1 or rows, T] are of one table."""
        lengths = _LENGTHS.get()
        if lengths is None:
            lengths = position_ids.max(dim=-1).values + 1
        long = lengths.to(position_ids.device) > self.limit
        if not bool(long.any()):
            return self._of(self.short, x, position_ids)
        if bool(long.all()):
            return self._of(self.long, x, position_ids)
        (short_cos, short_sin), (long_cos, long_sin) = (self._of(m, x, position_ids) for m in (self.short, self.long))
        row = long[:, None, None]
        return torch.where(row, long_cos, short_cos), torch.where(row, long_sin, short_sin)

    @staticmethod
    def _of(module: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = module(x, position_ids)
        return cos, sin


def _fixed(module: nn.Module, inv_freq: Tensor) -> nn.Module:
    """A copy whose table never changes."""
    twin: Any = copy.deepcopy(module)
    twin.rope_type = "default"
    twin.register_buffer("inv_freq", inv_freq.detach().clone(), persistent=False)
    return twin  # type: ignore[no-any-return]  # a copy of an nn.Module is one
