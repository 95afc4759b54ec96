"""Linear layers for sampling on a CPU: LoRA merged into the weight, the weight in the order that the kernel reads.

For the few rows of a decode step a product with a weight that was reordered in advance takes half the time of
``F.linear``, or three quarters; for long prompts it is no slower. Each policy version has its own reordered weights.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nat_plugin_evsys.engine.machine.allocator import give_back
from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.engine.machine.products import few_rows_product, for_few_rows
from nat_plugin_evsys.engine.model.lora import LoraAdapter, LoraLinear, applied
from nat_plugin_evsys.engine.spans.mixed import MixedAdapters

logger = logging.getLogger(__name__)

PackedWeights = dict[str, Tensor]
"""Module name -> reordered weight."""

_KEPT = 2
_FREE_SHARE = 0.5
_CHECKED_ROWS = 4
_TOLERANCE = 1e-4
_SHARED = -1
"""Ident of the base model's weights under several adapters; policies count from 0."""


class PackedLinear(nn.Module):
    """A linear layer that computes with ``packed`` if there is one, else with ``plain``; ``mixed`` adds to it."""

    def __init__(self, name: str, plain: nn.Linear) -> None:
        super().__init__()
        self.name = name
        self.plain = plain
        self.packed: Tensor | None = None
        self.mixed: MixedAdapters | None = None

    @property
    def weight(self) -> Tensor:
        """The base model's weight, without any adapter."""
        return self.plain.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        if self.packed is None:
            out: Tensor = self.plain(x)
        else:
            out = few_rows_product(x, self.packed, self.plain.bias)
        return out if self.mixed is None else self.mixed.add(self.name, x, out)


def replace_linears(model: PreTrainedModel) -> list[PackedLinear]:
    """Replace each adaptable linear layer, and the output head, by a ``PackedLinear``."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    found = []
    for name, module in layers:
        parent, _, leaf = name.rpartition(".")
        packed = PackedLinear(name, module)
        setattr(model.get_submodule(parent), leaf, packed)
        found.append(packed)
    return found


class PackedVersions:
    """The reordered weights of the policy versions in flight, and of the last ones that were.

    A version that does not fit in memory computes with the base model's weights and a separate adapter. So does every
    version of a model that is not fp32, where a merged weight would be rounded, and of one whose reordered weights give
    other products than its layers: the first without an adapter and the first with one are compared.
    """

    def __init__(self, layers: Iterable[PackedLinear], dtype: torch.dtype) -> None:
        self._layers = list(layers)
        self._able = dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self._in_flight: dict[int, PackedWeights | None] = {}
        self._idle: OrderedDict[int, PackedWeights] = OrderedDict()
        self._unadapted: PackedWeights = {}
        self._checked: set[bool] = set()
        self._current: int | None = None

    @property
    def names(self) -> set[str]:
        """Of the layers."""
        return {layer.name for layer in self._layers}

    @property
    def base_bytes(self) -> int:
        """Bytes of the layers' weights in the base model."""
        return sum(layer.weight.nbytes for layer in self._layers)

    def share(self, mixed: MixedAdapters) -> None:
        """Let the layers compute with the base model's weights, which are packed once, and ``mixed``."""
        self.use(_SHARED, None)
        for layer in self._layers:
            layer.mixed = mixed

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """In the ``with`` block every version computes with the base model's weights and a separate adapter."""
        able, self._able = self._able, False
        try:
            yield
        finally:
            self._able = able
            self.clear()

    def done_sharing(self) -> None:
        """End ``share``."""
        if _SHARED in self._in_flight:
            self.done(_SHARED)

    def use(self, ident: int, adapter: LoraAdapter | None) -> None:
        """Let the layers compute with the weights of version ``ident``."""
        if ident == self._current:
            return
        if ident not in self._in_flight:
            self._in_flight[ident] = self._idle.pop(ident, None) or self._new(adapter)
        weights = self._in_flight[ident]
        for layer in self._layers:
            layer.packed = None if weights is None else weights[layer.name]
            layer.mixed = None
        self._current = ident

    def done(self, ident: int) -> None:
        """End a version; its weights are kept until two later ones are done."""
        weights = self._in_flight.pop(ident, None)
        if weights is not None:
            self._idle[ident] = weights
        while len(self._idle) > _KEPT:
            self._idle.popitem(last=False)
        self._unpack()

    def forget(self, ident: int) -> None:
        """Free a version, unless it is in flight."""
        self._idle.pop(ident, None)

    def clear(self) -> None:
        """Free them all."""
        self._in_flight.clear()
        self._idle.clear()
        self._unadapted.clear()
        self._unpack()

    def _unpack(self) -> None:
        self._current = None
        for layer in self._layers:
            layer.packed = layer.mixed = None

    def _new(self, adapter: LoraAdapter | None) -> PackedWeights | None:
        if not self._able:
            return None
        if not self._fits():
            self._idle.clear()
        if self._fits():
            give_back()
            weights = self._pack(adapter)
            return weights if self._can_be_trusted(weights, adapter) else None
        logger.info("no memory for merged weights of one more policy version; it is sampled from unmerged, slower")
        return None

    def _can_be_trusted(self, weights: PackedWeights, adapter: LoraAdapter | None) -> bool:
        if (adapter is not None) in self._checked or not self._layers:
            return True
        with torch.inference_mode(), applied(adapter):
            gaps = {layer.name: _gap(layer, weights[layer.name]) for layer in self._layers}
        if any(math.isnan(gap) for gap in gaps.values()):
            return True  # the adapter's own products are not finite: the next one is compared
        self._checked.add(adapter is not None)
        worst = max(gaps, key=lambda name: gaps[name])
        if gaps[worst] <= _TOLERANCE:
            return True
        logger.warning(
            "policies are sampled from unmerged weights, slower: reordered ones give %s products that are off by %.1e",
            worst,
            gaps[worst],
        )
        self._able = False
        self._unadapted.clear()
        return False

    def _fits(self) -> bool:
        needed = sum(layer.weight.nbytes for layer in self._layers if layer.name not in self._unadapted)
        return needed <= _FREE_SHARE * free_bytes(torch.device("cpu"))

    def _pack(self, adapter: LoraAdapter | None) -> PackedWeights:
        adapted = [] if adapter is None else [layer for layer in self._layers if layer.name in adapter.weights]
        # One buffer for all merged weights: a freed one of each would leave gaps in the heap that nothing fits into.
        scratch = torch.empty(max((layer.weight.numel() for layer in adapted), default=0))
        return {layer.name: self._pack_layer(layer, adapter, scratch) for layer in self._layers}

    def _pack_layer(self, layer: PackedLinear, adapter: LoraAdapter | None, scratch: Tensor) -> Tensor:
        pair = None if adapter is None else adapter.weights.get(layer.name)
        if pair is None:
            # The same for all versions that do not adapt it; mostly the output head.
            if layer.name not in self._unadapted:
                self._unadapted[layer.name] = for_few_rows(layer.weight)
            return self._unadapted[layer.name]
        assert adapter is not None
        a, b = pair
        merged = scratch[: layer.weight.numel()].view_as(layer.weight)
        return for_few_rows(torch.addmm(layer.weight, b.float(), a.float(), alpha=adapter.scale, out=merged))


def _gap(layer: PackedLinear, weight: Tensor) -> float:
    """Largest difference of a few rows' products from the layer's own, relative to the largest; NaN if that is none."""
    x = torch.randn(_CHECKED_ROWS, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected: Tensor = layer.plain(x)
    if not expected.isfinite().all():
        return math.nan
    found = few_rows_product(x, weight, layer.plain.bias)
    gap = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(x.dtype).tiny))
    return math.inf if math.isnan(gap) else gap
