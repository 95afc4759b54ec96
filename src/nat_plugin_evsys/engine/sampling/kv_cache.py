"""Keys and values of the sequences being decoded, one slot each, and the masks that go with them.

A slot's column j holds the token at position j, in every layer, sliding-window layers included (the window is the
mask's business). So slots of any length decode together, and a slot's prefix can be copied to another slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from nat_plugin_evsys.engine.machine.mapped import mapped_zeros
from nat_plugin_evsys.errors import ModelError

_FIRST_LENGTH = 64
_LONG = 1024
_SLOTS_AT_ONCE = 8

SPARE_BYTES = 256 * 2**20
"""Largest store that is kept without a slot in use, for the next rows."""


@dataclass(frozen=True)
class KVLayout:
    """What a model keeps per token: ``(kv_heads, key_dim, value_dim)`` a layer, dtype and device."""

    layers: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def probe(cls, model: Any, device: torch.device) -> KVLayout:
        """Read the layout off one forward pass over one token.

        Raises:
            ModelError: the model keeps something other than keys and values of full or sliding-window attention.
        """
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if kinds or getattr(config, "attention_chunk_size", None) is not None:
            raise ModelError(
                f"cannot sample from {config.model_type!r}: it has {sorted(kinds) or ['chunked_attention']} layers, "
                "and the sampler supports only full_attention and sliding_attention; choose another base_model"
            )
        cache = DynamicCache()
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        model(input_ids=token, position_ids=token, past_key_values=cache, use_cache=True)
        layers: list[Any] = list(cache.layers)
        filled = [la for la in layers if getattr(la, "keys", None) is not None and la.keys.dim() == 4]
        if len(filled) != config.num_hidden_layers:
            raise ModelError(
                f"cannot sample from {config.model_type!r}: {len(filled)} of its {config.num_hidden_layers} layers "
                "keep keys and values; choose a base_model with attention in every layer"
            )
        shapes = tuple((la.keys.shape[1], la.keys.shape[3], la.values.shape[3]) for la in filled)
        return cls(shapes, filled[0].keys.dtype, device)

    @classmethod
    def nothing(cls, dtype: torch.dtype, device: torch.device) -> KVLayout:
        """Of a model whose states are kept elsewhere."""
        return cls(((0, 0, 0),), dtype, device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in a ``SlotStore``, padding to the widest layer included."""
        heads, dim = self.widest
        return 2 * len(self.layers) * heads * dim * self.dtype.itemsize

    @property
    def widest(self) -> tuple[int, int]:
        """``(kv_heads, head_dim)`` that every layer fits into."""
        return max(la[0] for la in self.layers), max(max(la[1:]) for la in self.layers)


class SlotStore:
    """KV memory ``[layers, 2, slots, kv_heads, length, head_dim]`` that grows as asked, from ``first_length`` on."""

    def __init__(self, layout: KVLayout, first_length: int = _FIRST_LENGTH) -> None:
        self.layout = layout
        self.first_length = first_length
        self.slots = 0
        self.length = 0
        self._data = self._zeros(0, 0)

    def reserve(self, slots: int, length: int) -> None:
        """Make room for ``slots`` slots of ``length`` tokens, keeping what is in the first ``slots``.

        Raises:
            MemoryError: there is none; the store stays as it was. On a GPU it is torch's own error.
        """
        if slots <= self.slots and length <= self.length:
            return
        new_slots, new_length = self.slots, self.length
        if length > self.length:
            # Longer slots may have to be fewer to stay within memory: those beyond ``slots`` are given up.
            new_slots, new_length = 0, rounded_length(length, self.first_length)
        new_slots = max(new_slots, slots if new_length > _LONG else _rounded(slots, _SLOTS_AT_ONCE))
        # Zeros, not uninitialised memory: a masked column still meets its value as 0 * v, and 0 * NaN is NaN.
        data = self._zeros(new_slots, new_length)
        kept = min(new_slots, self._data.shape[2])
        data[:, :, :kept, :, : self.length] = self._data[:, :, :kept]
        self._data, self.slots, self.length = data, new_slots, new_length
        self._views = [
            (self._data[i, 0, :, :heads, :, :k_dim], self._data[i, 1, :, :heads, :, :v_dim])
            for i, (heads, k_dim, v_dim) in enumerate(self.layout.layers)
        ]

    def views(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: each ``[slots, kv_heads, length, dim]``, sharing memory with the store."""
        return self._views[layer]

    def copy(self, source: int, target: int, length: int, store: SlotStore | None = None) -> None:
        """Copy the first ``length`` tokens of one slot, of another ``store`` if one is given, to another slot."""
        self._data[:, :, target, :, :length] = (store or self)._data[:, :, source, :, :length]

    @property
    def nbytes(self) -> int:
        """Bytes that the store takes."""
        return self._data.nbytes

    def wipe(self, slot: int) -> None:
        """Zero a slot."""
        self._data[:, :, slot] = 0

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """Tokens [start, end) of a slot, ``[layers, 2, kv_heads, end - start, head_dim]``: a view until it changes."""
        return self._data[:, :, slot, :, start:end]

    def write(self, slot: int, pieces: Sequence[Tensor]) -> int:
        """Write pieces from ``read`` to the start of a slot, one after another. Returns their length."""
        at = 0
        for piece in pieces:
            self._data[:, :, slot, :, at : at + piece.shape[3]] = piece
            at += piece.shape[3]
        return at

    def _zeros(self, slots: int, length: int) -> Tensor:
        heads, dim = self.layout.widest
        shape = (len(self.layout.layers), 2, slots, heads, length, dim)
        return mapped_zeros(shape, self.layout.dtype, self.layout.device)


class SlotCache(Cache):
    """The view of a ``SlotStore`` that one forward pass of a transformers model reads and writes.

    Args:
        store: where keys and values are kept; it has room for everything this pass adds.
        first, rows: the pass runs over slots ``first .. first + rows - 1``.
        positions: (rows, T) position of each input token.
        valid: (rows, T) False where a token is padding, which is not stored; None if T = 1 and nothing is.
        length: columns that attention looks at, the largest position plus 1.
    """

    is_compileable = False

    def __init__(
        self, store: SlotStore, first: int, rows: int, positions: Tensor, valid: Tensor | None, length: int
    ) -> None:
        super().__init__(layers=[])
        self._store = store
        self._span = slice(first, first + rows)
        self._length = length
        if valid is None:
            self._row = torch.arange(rows, device=positions.device)
            self._step: Tensor | None = None
            self._column = positions[:, 0]
        else:
            self._row, self._step = valid.nonzero(as_tuple=True)
            self._column = positions[self._row, self._step]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store ``[rows, kv_heads, T, dim]`` and return all ``[rows, kv_heads, length, dim]`` that attention sees."""
        keys, values = (view[self._span] for view in self._store.views(layer_idx))
        keys[self._row, :, self._column] = self._new(key_states)
        values[self._row, :, self._column] = self._new(value_states)
        return keys[:, :, : self._length], values[:, :, : self._length]

    def _new(self, states: Tensor) -> Tensor:
        return states[:, :, 0] if self._step is None else states[self._row, :, self._step]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that attention looks at; positions are always passed explicitly."""
        return self._length


class AttentionMasks:
    """Builds the additive masks in the form that a transformers model takes ready-made.

    The form follows ``transformers.masking_utils.create_masks_for_generate``: a dict by layer type for configs with
    ``layer_types``, else one mask for all layers (sliding if the config has a ``sliding_window``). Additive masks are
    what both eager and SDPA attention add to their scores.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        kinds = getattr(config, "layer_types", None)
        window: int | None = getattr(config, "sliding_window", None)
        self._by_kind = kinds is not None
        self._kinds = set(kinds) if kinds else {"full_attention" if window is None else "sliding_attention"}
        self._window = window or 0
        self._dtype = dtype

    def build(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Masks ``[rows, 1, T, length]`` for queries at ``positions`` (rows, T): 0 if seen, else the dtype's minimum.

        A query at position p sees columns j <= p, in sliding layers only j > p - window.
        """
        column = torch.arange(length, device=positions.device)
        query = positions[:, None, :, None]
        hidden = column > query
        masks = {"full_attention": self._additive(hidden)}
        if "sliding_attention" in self._kinds:
            near = length <= self._window
            masks["sliding_attention"] = (
                masks["full_attention"] if near else self._additive(hidden | (column <= query - self._window))
            )
        return masks if self._by_kind else masks[next(iter(self._kinds))]

    def _additive(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)


def rounded_length(length: int, first: int = _FIRST_LENGTH) -> int:
    """Tokens a slot that a ``SlotStore`` makes room for when ``length`` are asked for."""
    if length > _LONG:
        return _rounded(length, _LONG)
    size = first
    while size < length:
        size *= 2
    return size


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step
