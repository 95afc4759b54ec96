"""Which rows each epoch rolls out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nat_plugin_evsys.rollouts.row_batches import RowBatches

IDS = [f"row-{number}" for number in range(10)]


@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 3))
def test_every_pass_has_every_row_once(size: int, seed: int, number: int) -> None:
    batches = RowBatches(size, seed)
    per_pass = batches.epochs_per_pass(len(IDS))
    epochs = [batches.rows(IDS, number * per_pass + position) for position in range(per_pass)]
    assert Counter(row for rows in epochs for row in rows) == Counter(IDS)
    assert all(len(rows) == min(size, len(IDS)) for rows in epochs[:-1])
    assert all(rows == sorted(rows, key=IDS.index) for rows in epochs)


def test_passes_have_orders_of_their_own_which_the_seed_decides() -> None:
    assert RowBatches(None, 0).rows(IDS, 5) == IDS
    assert RowBatches(None, 0).epochs_per_pass(10) == 1
    passes = [[RowBatches(4, seed).rows(IDS, epoch) for epoch in range(9)] for seed in (0, 0, 1)]
    assert passes[0] == passes[1] != passes[2]
    assert passes[0][:3] != passes[0][3:6] != passes[0][6:]
