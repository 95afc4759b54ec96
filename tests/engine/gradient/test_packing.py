"""Cutting steps into packs: whole, within the limit, and as cheap as the best of all ways to cut."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_plugin_evsys.engine.gradient.batching import default_token_budget
from nat_plugin_evsys.engine.gradient.packing import cut, plan_packs
from nat_plugin_evsys.engine.machine.memory import MemoryModel, TokenLimits
from nat_plugin_evsys.engine.tree.trie import SortedSequences, TokenTrie

families = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=9)


def arrays(family: list[list[int]]) -> list[np.ndarray]:
    return [np.array(s, dtype=np.int64) for s in family]


@given(families, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_sequence_is_in_one_pack_with_its_prefix(family: list[list[int]], most: int) -> None:
    packs = plan_packs(arrays(family), TokenLimits(most, most))
    assert sorted(i for pack in packs for i in pack.members) == list(range(len(family)))
    for pack in packs:
        assert len(pack.trie) == len(TokenTrie.build([arrays(family)[i] for i in pack.members]))
        assert len(pack.trie) <= most or len(pack.members) == 1
        for i, rows in zip(pack.members, pack.trie.rows, strict=True):
            assert pack.trie.tokens[rows].tolist() == family[i]


@given(families, st.integers(12, 40))
@settings(max_examples=60, deadline=None)
def test_no_other_cut_computes_fewer_tokens(family: list[list[int]], most: int) -> None:
    sequences = arrays(family)
    order = SortedSequences.build(sequences).order

    def rows(ranges: list[tuple[int, int]]) -> list[int]:
        return [len(TokenTrie.build([sequences[i] for i in order[a:b]])) for a, b in ranges]

    def cost(sizes: list[int]) -> float:
        return sum(sizes) + 32 * len(sizes)

    best = min(
        cost(sizes)
        for k in range(len(family))
        for places in itertools.combinations(range(1, len(family)), k)
        if max(sizes := rows(list(itertools.pairwise([0, *places, len(family)])))) <= most
    )
    packs = plan_packs(sequences, TokenLimits(most, most))
    assert cost([len(p.trie) for p in packs]) == best


def test_groups_are_parted_before_anything_shared_is_repeated() -> None:
    lengths = np.full(8, 1000)
    shared = np.array([0, 800, 800, 800, 0, 800, 800, 800])
    assert cut(lengths, shared, TokenLimits(10_000, 1700)) == [(0, 4), (4, 8)]
    # A comfortable size is worth less than the 800 tokens that one more cut repeats; the limit is not.
    assert cut(lengths, shared, TokenLimits(10_000, 1300)) == [(0, 4), (4, 8)]
    assert cut(lengths, shared, TokenLimits(1300, 1300)) == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_the_memory_model_goes_through_its_two_measurements() -> None:
    model = MemoryModel.fit((10, 1500), (50, 5500))
    assert model.predict(10) == 1500
    assert model.predict(50) == 5500


def test_blocks_that_torch_keeps_for_itself_are_free_memory_of_a_gpu(
    base_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dataclasses.replace(base_of("qwen3"), device=torch.device("cuda"))
    held = {"free": 0, "reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (held["free"], 2**36))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["allocated"])
    held.update(free=40_000_000)
    expected = default_token_budget(base)
    held.update(free=10_000_000, reserved=35_000_000, allocated=5_000_000)
    assert 256 < default_token_budget(base) == expected < 65536
