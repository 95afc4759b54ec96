"""Several adapters in one pass: each row has the delta of its own, over weights that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.lora import LoraAdapter

_Layer = tuple[Tensor, Tensor]
"""``A [slots, rank, in]`` and ``B [slots, rank, out]`` with the scale in it; what an adapter lacks is zero."""


class MixedAdapters:
    """Adapters in slots. A layer is two batched products: the rows of each slot with its ``A``, then with its ``B``.

    So each row is multiplied by its own adapter only, as in S-LoRA (arXiv 2311.03285) without its kernels.
    """

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._layers: dict[str, _Layer] = {}
        self._rank = self._room = 0
        self._starts: list[int] = [0]
        self._rows = self._even = 0

    def hold(self, adapters: Mapping[int, LoraAdapter]) -> list[int]:
        """Hold these adapters, by the policies' idents, and no others. Gives the idents in the order of the slots.

        Only what is new is written, unless there is no room for it: policies come and go while others decode.
        """
        for ident in [each for each in self._slots if each not in adapters]:
            self.drop(ident)
        new = {ident: adapter for ident, adapter in adapters.items() if ident not in self._slots}
        if new and not self._takes(new):
            self._make_room(adapters)
            new = dict(adapters)
        for ident, adapter in new.items():
            self._write(len(self._slots), adapter)
            self._slots.append(ident)
        return list(self._slots)

    def drop(self, ident: int) -> None:
        """Free a policy's slot, if it has one; the last one moves there. With the last policy everything goes."""
        if ident not in self._slots:
            return
        slot, last = self._slots.index(ident), len(self._slots) - 1
        if slot < last:
            for a, b in self._layers.values():
                a[slot], b[slot] = a[last], b[last]
        self._slots[slot] = self._slots[last]
        self._slots.pop()
        if not self._slots:
            self.clear()

    def clear(self) -> None:
        """Free everything."""
        self._slots, self._layers = [], {}
        self._rank = self._room = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the slots take."""
        return sum(a.nbytes + b.nbytes for a, b in self._layers.values())

    def set_rows(self, counts: Sequence[int]) -> None:
        """The next rows are so many of the first slot, then of the second, and so on, and then of the bare base model.

        Args:
            counts: of each slot; any more are those of the bare model.
        """
        adapted = counts[: len(self._slots)]
        self._starts = [0, *accumulate(adapted)]
        self._rows = sum(counts)
        self._even = counts[0] if adapted and len(set(adapted)) == 1 else 0

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """``out [..., rows, out]`` plus each row's delta of layer ``name`` for ``x [..., rows, in]``; changes ``out``.

        Raises:
            ValueError: the layer is given other rows than those that were set.
        """
        if name not in self._layers:
            return out
        inputs, outputs = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if len(inputs) != self._rows:
            raise ValueError(f"{name} computes {len(inputs)} rows of {self._rows}")
        a, b = self._layers[name]
        if self._even:
            groups, last = len(self._slots), self._starts[-1]
            inner = torch.bmm(inputs[:last].view(groups, self._even, -1), a[:groups].transpose(1, 2))
            outputs[:last].view(groups, self._even, -1).baddbmm_(inner, b[:groups])
            return out
        for slot, (start, stop) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if start < stop:
                outputs[start:stop].addmm_(inputs[start:stop] @ a[slot].T, b[slot])
        return out

    def _takes(self, new: Mapping[int, LoraAdapter]) -> bool:
        fits = all(each.rank <= self._rank and set(each.weights) <= set(self._layers) for each in new.values())
        return fits and len(self._slots) + len(new) <= self._room

    def _make_room(self, adapters: Mapping[int, LoraAdapter]) -> None:
        """Empty slots, as large as these adapters need them."""
        self.clear()  # freed before the next are made
        self._rank, self._room = max(adapter.rank for adapter in adapters.values()), len(adapters)
        shapes = {name: (a.shape[1], b.shape[0]) for each in adapters.values() for name, (a, b) in each.weights.items()}
        for name, (inputs, outputs) in shapes.items():
            a, b = (torch.empty(self._room, self._rank, width) for width in (inputs, outputs))
            self._layers[name] = a, b

    def _write(self, slot: int, adapter: LoraAdapter) -> None:
        for name, (to_a, to_b) in self._layers.items():
            pair = adapter.weights.get(name)
            rank = 0 if pair is None else len(pair[0])
            if pair is not None:
                to_a[slot, :rank] = pair[0]
                to_b[slot, :rank] = pair[1].T.float() * adapter.scale
            to_a[slot, rank:], to_b[slot, rank:] = 0.0, 0.0
