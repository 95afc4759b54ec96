"""Slots of rows: each holds the end of its row's context and what was sampled since.

Slots of like length lie side by side in one store, whichever policies their rows are of, so that a pass attends to all
of them in one call. A row whose slot is full moves to a longer one; so do others, if few, to save a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nat_plugin_evsys.engine.sampling.kv_cache import SPARE_BYTES, KVLayout, SlotStore, rounded_length
from nat_plugin_evsys.engine.spans.attention import OwnTokens

FIRST_LENGTH = 16

_WASTED = 512
"""Columns more, of all slots, up to which one length for all is quicker: a call costs what some 300 columns do."""


def length_for(tokens: int) -> int:
    """Of the slot that a row of so many tokens gets."""
    return rounded_length(tokens, FIRST_LENGTH)


@dataclass(eq=False)
class Slot:
    """The first ``filled`` columns of slot ``number`` of a group's store. The number changes as others are freed."""

    group: _Group
    number: int
    filled: int = 0


@dataclass(eq=False)
class _Group:
    """Slots of one length; those in use are the first of the store."""

    store: SlotStore
    slots: list[Slot] = field(default_factory=list)

    def remove(self, number: int) -> None:
        """Free a slot; the last one moves there."""
        last = self.slots.pop()
        if number < len(self.slots):
            self.store.copy(last.number, number, last.filled)
            last.number = number
            self.slots[number] = last


class RowSlots:
    """The slots of decoders whose rows step together, of one decoder or several."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self._groups: dict[int, _Group] = {}

    def enter(self, starts: Sequence[tuple[Sequence[Tensor], int]]) -> list[Slot]:
        """Slots that begin with pieces from ``read``, with room for so many tokens in all.

        For several rows at once: every enlargement copies a store, which is then there twice.
        """
        lengths = [length_for(room) for _, room in starts]
        together = self._together(lengths)
        lengths = [together or length for length in lengths]
        for length, count in Counter(lengths).items():
            self._reserve(length, count)
        slots = []
        for (pieces, _), length in zip(starts, lengths, strict=True):
            group = self._groups[length]
            slot = Slot(group, len(group.slots))
            group.slots.append(slot)
            slot.filled = group.store.write(slot.number, pieces)
            slots.append(slot)
        return slots

    def adopt(self, slots: Sequence[Slot], other: RowSlots) -> None:
        """Take these slots over from ``other``."""
        for length in {slot.group.store.length for slot in slots}:
            self._move([slot for slot in slots if slot.group.store.length == length], length)
        other._tidy()

    def clear(self) -> None:
        """Free everything."""
        self._groups.clear()

    def read(self, slot: Slot, start: int, end: int) -> Tensor:
        """Tokens [start, end), ``[layers, 2, kv_heads, end - start, head_dim]``: a view until the slot changes."""
        return slot.group.store.read(slot.number, start, end)

    def free(self, slot: Slot, *, failed: bool = False) -> None:
        """Free a slot.

        A ``failed`` one may hold NaN, which would reach the slot's next owner through its masked columns, and another's
        end may have moved it here: what nobody uses is zeroed.
        """
        group = slot.group
        if failed:
            for number in (slot.number, *range(len(group.slots), group.store.slots)):
                group.store.wipe(number)
        group.remove(slot.number)
        if not group.slots:
            self._tidy(group)

    def own_tokens(self, at: Mapping[Slot, int]) -> list[OwnTokens]:
        """What the pass's tokens ``at`` add to their slots and see there.

        Raises:
            ValueError: they are not all slots in use.
        """
        if sum(len(group.slots) for group in self._groups.values()) != len(at):
            raise ValueError(f"a pass has tokens for {len(at)} slots, and other slots are in use")
        for length, group in list(self._groups.items()):
            self._move([slot for slot in group.slots if slot.filled == length], length_for(length + 1))
        if together := self._together():
            for length in self._groups.keys() - {together}:
                self._move(list(self._groups[length].slots), together)
        return [_own_tokens(group, at) for group in self._groups.values() if group.slots]

    def _together(self, new: Sequence[int] = ()) -> int:
        """The length that all get, and more rows that need ``new`` lengths; 0 if each has the length that it needs."""
        longest = max((*new, *(length for length, group in self._groups.items() if group.slots)), default=0)
        used = [length_for(slot.filled + 1) for group in self._groups.values() for slot in group.slots]
        return longest if sum(longest - length for length in (*new, *used)) <= _WASTED else 0

    def _reserve(self, length: int, count: int) -> None:
        group = self._groups.setdefault(length, _Group(SlotStore(self.layout, length)))
        group.store.reserve(len(group.slots) + count, length)

    def _move(self, slots: Sequence[Slot], length: int) -> None:
        """Move slots of one group to that of ``length``."""
        if not slots:
            return
        self._reserve(length, len(slots))
        source, target = slots[0].group, self._groups[length]
        numbers = [slot.number for slot in slots]
        for slot in slots:
            target.store.copy(slot.number, len(target.slots), slot.filled, source.store)
            slot.group, slot.number = target, len(target.slots)
            target.slots.append(slot)
        for number in sorted(numbers, reverse=True):
            source.remove(number)
        if not source.slots:
            self._groups = {at: group for at, group in self._groups.items() if group is not source}

    def _tidy(self, spare: _Group | None = None) -> None:
        """Drop groups without a slot in use, but for ``spare``, if it is small."""
        keep = spare if spare is not None and spare.store.nbytes <= SPARE_BYTES else None
        self._groups = {length: group for length, group in self._groups.items() if group.slots or group is keep}


def _own_tokens(group: _Group, at: Mapping[Slot, int]) -> OwnTokens:
    tokens = [at[slot] for slot in group.slots]
    first, rows = tokens[0], len(tokens)
    where = slice(first, first + rows) if tokens == list(range(first, first + rows)) else torch.tensor(tokens)
    columns = torch.tensor([slot.filled for slot in group.slots])
    longest, mask = int(columns.max()) + 1, None
    if int(columns.min()) + 1 < longest:
        hidden = torch.arange(longest) > columns[:, None]
        mask = torch.zeros(hidden.shape, dtype=group.store.layout.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None]
    return OwnTokens(group.store, where, columns, longest, mask)
