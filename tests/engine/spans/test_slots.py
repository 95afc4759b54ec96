"""Slots keep what they hold while others come, grow and go, and a pass attends to all of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nat_plugin_evsys.engine.sampling.kv_cache import KVLayout
from nat_plugin_evsys.engine.spans import slots as row_slots
from nat_plugin_evsys.engine.spans.slots import RowSlots, Slot, length_for

LAYERS, HEADS, DIM = 2, 2, 4
LAYOUT = KVLayout(((HEADS, DIM, DIM),) * LAYERS, torch.float32, torch.device("cpu"))


def tokens(count: int) -> Tensor:
    return torch.randn(LAYERS, 2, HEADS, count, DIM)


class Rows:
    """What the slots must hold."""

    def __init__(self) -> None:
        self.slots = RowSlots(LAYOUT)
        self.held: dict[Slot, Tensor] = {}

    def enter(self, lengths: list[int], ahead: int) -> list[Slot]:
        starts = [[tokens(length // 2), tokens(length - length // 2)] if length else [] for length in lengths]
        new = self.slots.enter([(pieces, length + ahead) for pieces, length in zip(starts, lengths, strict=True)])
        self.held |= {
            slot: torch.cat(pieces, dim=3) if pieces else tokens(0) for slot, pieces in zip(new, starts, strict=True)
        }
        return new

    def step(self) -> list[Any]:
        """A token for each row, as attention adds it, in an order of the rows' own."""
        order = random.sample(list(self.held), len(self.held))
        new = tokens(len(order))
        groups = self.slots.own_tokens({slot: token for token, slot in enumerate(order)})
        for own in groups:
            for layer in range(LAYERS):
                for side, view in enumerate(own.store.views(layer)):
                    view[: len(own.columns)][own.places] = new[layer, side][:, own.where].transpose(0, 1)
        for at, slot in enumerate(order):
            slot.filled += 1
            self.held[slot] = torch.cat([self.held[slot], new[:, :, :, at : at + 1]], dim=3)
        return groups

    def check(self) -> None:
        for slot, expected in self.held.items():
            assert torch.equal(self.slots.read(slot, 0, slot.filled), expected)
            assert slot.group.store.length >= slot.filled


@pytest.mark.parametrize("wasted", [-1, 100, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_rows_keep_their_tokens_while_others_come_grow_and_go(
    seed: int, wasted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_slots, "_WASTED", wasted)
    torch.manual_seed(seed)
    draw = random.Random(seed)
    random.seed(seed)
    rows = Rows()
    for _ in range(60):
        rows.enter([draw.choice([0, 3, 15, 16, 40]) for _ in range(draw.randint(0, 4))], draw.randint(1, 16))
        rows.check()
        for _ in range(draw.randint(1, 5)):
            if rows.held:
                groups = rows.step()
                assert sum(len(own.columns) for own in groups) == len(rows.held)
                assert len({own.store.length for own in groups}) == len(groups)
                assert len(groups) == 1 or wasted < 1 << 20
        rows.check()
        for slot in draw.sample(list(rows.held), draw.randint(0, len(rows.held))):
            rows.slots.free(slot, failed=draw.random() < 0.3)
            del rows.held[slot]
        rows.check()
    for slot in list(rows.held):
        rows.slots.free(slot)
    assert rows.slots.own_tokens({}) == []


def test_a_row_with_room_for_all_of_it_never_moves() -> None:
    rows = Rows()
    slots = rows.enter([10] * 3, 16)
    store = slots[0].group.store
    for _ in range(16):
        [own] = rows.step()
        assert own.store is store
    for _ in range(8):
        [own] = rows.step()
    assert own.store is not store
    assert own.store.length == length_for(34) == 64
    rows.check()


@pytest.mark.parametrize("kept", [True, False])
def test_the_memory_of_a_batch_serves_the_next_one_unless_it_is_large(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows()
    slots = rows.enter([10] * 3, 16)
    store = slots[0].group.store
    monkeypatch.setattr(row_slots, "SPARE_BYTES", store.nbytes if kept else store.nbytes - 1)
    for slot in slots:
        rows.slots.free(slot)
    rows.held.clear()
    [again] = rows.enter([12], 16)
    assert (again.group.store is store) == kept
    rows.check()


def test_the_nan_of_a_failed_row_reaches_no_later_owner_even_if_it_was_moved() -> None:
    rows = Rows()
    first, _, broken = rows.enter([5] * 3, 4)
    store = broken.group.store
    for layer in range(LAYERS):
        for view in store.views(layer):
            view[broken.number, :, :5] = float("nan")
    rows.slots.free(first)  # of another policy; the broken one moves there
    assert broken.number == 0
    rows.slots.free(broken, failed=True)
    assert store._data.isfinite().all()


def test_a_pass_without_a_row_in_use_is_refused() -> None:
    rows = Rows()
    one, _ = rows.enter([2, 2], 4)
    with pytest.raises(ValueError, match="other slots are in use"):
        rows.slots.own_tokens({one: 0})


def test_slots_of_a_decoder_can_be_taken_apart() -> None:
    rows = Rows()
    slots = rows.enter([2, 30, 2, 2], 4)
    rows.step()
    apart = RowSlots(LAYOUT)
    apart.adopt(slots[1:3], rows.slots)
    for slot in slots[1:3]:
        assert torch.equal(apart.read(slot, 0, slot.filled), rows.held.pop(slot))
    rows.check()
    rows.step()
    rows.check()
    assert sum(len(own.columns) for own in apart.own_tokens(dict(zip(slots[1:3], (0, 1), strict=True)))) == 2


def test_rows_share_the_longest_slots_where_that_wastes_little_only() -> None:
    few = Rows()
    few.enter([20] * 3 + [70], 4)
    assert [own.store.length for own in few.step()] == [128]
    few.enter([5], 1)
    assert [own.store.length for own in few.step()] == [128]
    few.check()
    many = Rows()
    many.enter([20] * 9 + [70], 4)
    assert {own.store.length for own in many.step()} == {32, 128}
    many.check()
