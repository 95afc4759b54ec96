"""Attention of new tokens to spans of the tree, to their row's own tokens and to each other, on the CPU.

Every part is one call of a kernel that also gives the log-sum-exp of its scores, and parts are merged exactly:
``o = lerp(o1, o2, sigmoid(l2 - l1))``, ``l = logaddexp(l1, l2)``. So the keys and values of a prompt are read once for
all rows that continue from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from nat_plugin_evsys.engine.sampling.kv_cache import SlotStore

IMPLEMENTATION = "evsys_spans"


@dataclass(frozen=True)
class Piece:
    """New tokens ``[start, stop)`` of a pass, whose keys and values go to ``kv`` from column ``at`` on.

    They see each other causally, and what ``kv`` has before ``at``.
    """

    start: int
    stop: int
    kv: Tensor
    at: int


@dataclass(frozen=True)
class Read:
    """New tokens ``[start, stop)``, in the order of their ``Level``, see the first ``length`` columns of ``kv``."""

    start: int
    stop: int
    kv: Tensor
    length: int

    @cached_property
    def views(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values by layer, ``[1, kv_heads, length, dim]`` each."""
        seen = self.kv[:, :, None, :, : self.length]
        return [(layer[0], layer[1]) for layer in seen.unbind(0)]


@dataclass(frozen=True)
class Level:
    """Reads of different tokens. ``order`` lists the tokens, or is a slice if they lie side by side."""

    order: slice | Tensor
    reads: Sequence[Read]


@dataclass(frozen=True)
class OwnTokens:
    """Tokens ``where`` of a pass are those of rows: row i's goes to column ``columns[i]`` of slot i.

    ``mask [rows, 1, 1, length]`` hides columns of rows that are shorter than the longest; None if none is.
    """

    store: SlotStore
    where: slice | Tensor
    columns: Tensor
    length: int
    mask: Tensor | None

    @cached_property
    def places(self) -> tuple[slice | Tensor, slice, int | Tensor]:
        """Where the new keys go in ``[rows, kv_heads, length, dim]``. One column for all is copied faster."""
        if self.mask is None:
            return slice(None), slice(None), self.length - 1
        return torch.arange(len(self.columns)), slice(None), self.columns


@dataclass
class SpanPlan:
    """Who sees what in a pass over ``tokens`` tokens."""

    tokens: int
    own: list[OwnTokens] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)


_ACTIVE: ContextVar[SpanPlan | None] = ContextVar("evsys_span_plan", default=None)


@contextmanager
def attending(plan: SpanPlan) -> Iterator[None]:
    """Forward passes of a model that is ``installed``, in this thread, attend along ``plan``."""
    token = _ACTIVE.set(plan)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def install(model: PreTrainedModel) -> None:
    """Let ``model`` attend along plans; it must choose its attention through ``AttentionInterface``."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    model.config.get_text_config()._attn_implementation_internal = IMPLEMENTATION


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [1, heads, T, dim]``, ``key`` and ``value [1, kv_heads, T, dim]`` -> ``[1, T, heads, dim]``."""
    plan = _ACTIVE.get()
    assert plan is not None
    layer: int = module.layer_idx  # type: ignore[assignment]  # torch knows tensors and modules only
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return span_attention(query, key, value, plan, layer, scale).transpose(1, 2), None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def span_attention(query: Tensor, key: Tensor, value: Tensor, plan: SpanPlan, layer: int, scale: float) -> Tensor:
    """Store the new keys and values, and attend.

    Args:
        query: [1, heads, T, dim]. key, value: [1, kv_heads, T, dim]; heads is a multiple of kv_heads.
        plan: of these T tokens.
        layer: its number.
        scale: of the scores.

    Returns:
        [1, heads, T, dim], in memory [1, T, heads, dim].
    """
    _, heads, tokens, dim = query.shape
    out = query.new_empty(1, tokens, heads, dim).transpose(1, 2)
    lse = query.new_empty(1, tokens, heads, dtype=torch.float32).transpose(1, 2)
    for own in plan.own:
        _own(query, key, value, own, layer, scale, out, lse)
    for piece in plan.pieces:
        here = slice(piece.start, piece.stop)
        q, k, v = query[:, :, here], key[:, :, here], value[:, :, here]
        span = slice(piece.at, piece.at + piece.stop - piece.start)
        piece.kv[layer, 0, :, span], piece.kv[layer, 1, :, span] = k[0], v[0]
        out[:, :, here], lse[:, :, here] = _flash(q, k, v, 0.0, True, scale=scale)
    for level in plan.levels:
        _read(query, level, layer, scale, out, lse)
    return out


def _own(
    query: Tensor, key: Tensor, value: Tensor, own: OwnTokens, layer: int, scale: float, out: Tensor, lse: Tensor
) -> None:
    where, at = own.where, own.places
    keys, values = (view[: len(own.columns)] for view in own.store.views(layer))
    keys[at], values[at] = key[0, :, where].transpose(0, 1), value[0, :, where].transpose(0, 1)
    part, part_lse = _flash(
        query[0, :, where].transpose(0, 1)[:, :, None],
        keys[:, :, : own.length],
        values[:, :, : own.length],
        0.0,
        False,
        attn_mask=own.mask,
        scale=scale,
    )
    out[0, :, where], lse[0, :, where] = part[:, :, 0].transpose(0, 1), part_lse[:, :, 0].transpose(0, 1)


def _read(query: Tensor, level: Level, layer: int, scale: float, out: Tensor, lse: Tensor) -> None:
    q = query[:, :, level.order]
    parts = []
    for read in level.reads:
        keys, values = read.views[layer]
        parts.append(_flash(q[:, :, read.start : read.stop], keys, values, 0.0, False, scale=scale))
    if len(parts) == 1:
        part, part_lse = parts[0]
    else:
        part, part_lse = torch.cat([p[0] for p in parts], dim=2), torch.cat([p[1] for p in parts], dim=2)
    here, here_lse = out[:, :, level.order], lse[:, :, level.order]
    merged = torch.lerp(here, part, torch.sigmoid(part_lse - here_lse).unsqueeze(-1))
    out[:, :, level.order] = merged
    lse[:, :, level.order] = torch.logaddexp(here_lse, part_lse)
