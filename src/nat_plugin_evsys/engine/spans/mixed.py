"""Several adapters in one pass: each row has the delta of its own, over weights that all of them share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nat_plugin_evsys.engine.model.lora import LoraAdapter


class MixedAdapters:
    """Adapters side by side: ``A`` of all of them is one matrix, ``B`` another, and a row sees its own columns only.

    So a layer costs two further products however many there are, as in S-LoRA (arXiv 2311.03285) without its kernels.

    Args:
        adapters: of each group of rows; None is the bare base model. Their weights are finite, since a product with
            zero hides nothing else.
    """

    def __init__(self, adapters: Sequence[LoraAdapter | None]) -> None:
        self.names = {name for adapter in adapters if adapter is not None for name in adapter.weights}
        self._groups = torch.zeros(0, dtype=torch.long)
        self._hidden: dict[tuple[int, ...], Tensor] = {}
        self._layers = {name: _side_by_side(name, adapters) for name in sorted(self.names)}

    def set_rows(self, counts: Sequence[int]) -> None:
        """The next rows are so many of the first group, then of the second, and so on."""
        self._groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self._hidden = {}

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """``out [..., rows, out]`` plus each row's delta of layer ``name`` for ``x [..., rows, in]``; changes ``out``.

        Raises:
            ValueError: the layer is given other rows than those that were set.
        """
        if name not in self._layers:
            return out
        if x.shape[-2] != len(self._groups):
            raise ValueError(f"{name} computes {x.shape[-2]} rows of {len(self._groups)}")
        a, b, ranks = self._layers[name]
        inner = F.linear(x, a).masked_fill_(self._hides(ranks), 0.0)
        return out.add_(F.linear(inner, b))

    def _hides(self, ranks: tuple[int, ...]) -> Tensor:
        """[rows, sum of ranks]: true at columns of other groups."""
        if ranks not in self._hidden:
            owners = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            self._hidden[ranks] = owners != self._groups[:, None]
        return self._hidden[ranks]


def is_finite(adapter: LoraAdapter | None) -> bool:
    """Whether no weight of the adapter is NaN or infinite."""
    return adapter is None or all(bool(tensor.isfinite().all()) for _, tensor in adapter.named_tensors())


def _side_by_side(name: str, adapters: Sequence[LoraAdapter | None]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """``A [sum of ranks, in]``, ``B [out, sum of ranks]`` with the scales in it, and the rank of each group."""
    pairs = [None if adapter is None else adapter.weights.get(name) for adapter in adapters]
    scales = [0.0 if adapter is None else adapter.scale for adapter in adapters]
    a = torch.cat([pair[0].float() for pair in pairs if pair is not None])
    b = [pair[1].float() * scale for pair, scale in zip(pairs, scales, strict=True) if pair is not None]
    return a, torch.cat(b, dim=1), tuple(0 if pair is None else len(pair[0]) for pair in pairs)
