"""The trie against its definition, on random families of sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_plugin_evsys.engine.tree.trie import SortedSequences, TokenTrie

# Two symbols and short lengths make duplicates, prefixes of one another and deep branching common.
families = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=10)


def arrays(family: list[list[int]]) -> list[np.ndarray]:
    return [np.array(s, dtype=np.int64) for s in family]


def prefixes(family: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(s[: i + 1]) for s in family for i in range(len(s))}


def prefix_of_row(trie: TokenTrie, family: list[list[int]]) -> dict[int, tuple[int, ...]]:
    return {int(r): tuple(s[: i + 1]) for s, rows in zip(family, trie.rows, strict=True) for i, r in enumerate(rows)}


@given(families)
@settings(max_examples=200, deadline=None)
def test_each_distinct_prefix_has_exactly_one_row(family: list[list[int]]) -> None:
    trie = TokenTrie.build(arrays(family))
    by_row = prefix_of_row(trie, family)
    assert len(trie) == len(prefixes(family)) == len(by_row)
    assert set(by_row.values()) == prefixes(family)
    in_order = SortedSequences.build(arrays(family))
    assert (in_order.lengths - in_order.shared).sum() == len(trie)
    for row, prefix in by_row.items():
        assert trie.tokens[row] == prefix[-1]
        assert trie.depths[row] == len(prefix) - 1


@given(families)
@settings(max_examples=200, deadline=None)
def test_descendants_are_the_rows_up_to_the_subtree_end(family: list[list[int]]) -> None:
    trie = TokenTrie.build(arrays(family))
    by_row, ends = prefix_of_row(trie, family), trie.subtree_ends()
    for k, above in by_row.items():
        below = {q for q, prefix in by_row.items() if prefix[: len(above)] == above}
        assert below == set(range(k, int(ends[k])))


@given(families)
@settings(max_examples=200, deadline=None)
def test_chains_cover_the_rows_and_hang_where_they_say(family: list[list[int]]) -> None:
    trie = TokenTrie.build(arrays(family))
    by_row, ends = prefix_of_row(trie, family), trie.subtree_ends()
    assert [c.start for c in trie.chains] == [0, *(c.end for c in trie.chains)][:-1]
    assert trie.chains[-1].end == len(trie)
    for chain in trie.chains:
        for row in range(chain.start + 1, chain.end):
            assert by_row[row][:-1] == by_row[row - 1]
        assert chain.subtree_end == ends[chain.start]
        if chain.parent < 0:
            assert len(by_row[chain.start]) == 1
        else:
            above = trie.chains[chain.parent].start + chain.attach - 1
            assert above < trie.chains[chain.parent].end
            assert by_row[chain.start][:-1] == by_row[above]


def test_an_extension_of_the_last_sequence_goes_on_in_its_chain() -> None:
    turns = [np.arange(n) for n in (5, 9, 14)]
    trie = TokenTrie.build(turns)
    assert len(trie.chains) == 1
    assert len(trie) == 14
