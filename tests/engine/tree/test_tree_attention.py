"""Trie attention against dense attention under the mask that the trie's definition gives."""

from __future__ import annotations

import random
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nat_plugin_evsys.engine.tree.attention import tree_attention
from nat_plugin_evsys.engine.tree.flex_attention import allow_compilations, descent_mask, flex_tree_attention
from nat_plugin_evsys.engine.tree.plan import Blocks, Run, TreePlan
from nat_plugin_evsys.engine.tree.trie import TokenTrie

CPU = torch.device("cpu")


def branching(seed: int, longest: int = 24) -> TokenTrie:
    """A trie of depth 1 to 6 with duplicates and prefixes."""
    rng = random.Random(seed)
    family = [[rng.randrange(3) for _ in range(rng.randint(1, longest))]]
    for _ in range(rng.randint(0, 9)):
        start = rng.choice(family)
        kept = start[: rng.randint(0, len(start))]
        family.append(kept + [rng.randrange(3) for _ in range(rng.randint(0 if kept else 1, longest // 2))])
    return TokenTrie.build([np.array(s, dtype=np.int64) for s in family])


def dense(query: Tensor, key: Tensor, value: Tensor, trie: TokenTrie, scale: float) -> Tensor:
    allowed = torch.zeros(len(trie), len(trie), dtype=torch.bool)
    for rows in trie.rows:
        for i, row in enumerate(rows):
            allowed[row, rows[: i + 1]] = True
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = (query @ key.transpose(-1, -2)) * scale
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


def inputs(rows: int, seed: int, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # In memory [1, T, heads, dim], as the projections of a model give them.
    shapes = [(1, rows, h, 16) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).transpose(1, 2).requires_grad_() for s in shapes]


@pytest.mark.parametrize("seed", range(25))
def test_output_and_gradient_are_those_of_dense_attention(seed: int) -> None:
    trie = branching(seed)
    heads, kv_heads = random.Random(seed).choice([(4, 4), (4, 2), (6, 1)])
    qkv = inputs(len(trie), seed, heads, kv_heads)
    out = tree_attention(*qkv, TreePlan.build(trie, CPU), 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    found = torch.autograd.grad(out, qkv, grad)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    expected = dense(*exact, trie, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("seed", "longest"), [(0, 24), (1, 24), (2, 24), (3, 400), (4, 700)])
def test_flex_attention_has_the_same_output(seed: int, longest: int) -> None:
    trie = branching(seed, longest)
    qkv = [t.detach() for t in inputs(len(trie), seed, 4, 2)]
    plan = TreePlan.build(trie, CPU)
    torch.testing.assert_close(
        flex_tree_attention(*qkv, plan.block_mask, 0.3), tree_attention(*qkv, plan, 0.3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(12))
def test_blocks_of_the_mask_are_those_of_the_whole_mask(seed: int) -> None:
    mask = descent_mask(torch.from_numpy(branching(seed, longest=50 + 200 * seed).subtree_ends()))
    assert_same_blocks(mask)


@pytest.mark.parametrize("lengths", [(1,), (127,), (128,), (129,), (256,), (384, 384), (640, 300)])
def test_blocks_of_the_mask_at_the_edges_of_blocks(lengths: tuple[int, ...]) -> None:
    chains = [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    mask = descent_mask(torch.from_numpy(TokenTrie.build(chains).subtree_ends()))
    assert_same_blocks(mask)
    assert bool(mask.full_kv_num_blocks.any()) == (max(lengths) >= 256)


def test_the_mask_of_a_big_pack_is_built_without_a_cell_for_each_pair_of_rows() -> None:
    trie = TokenTrie.build([np.concatenate([np.arange(9_000), np.full(9_000, 10_000 + i)]) for i in range(8)])
    with Largest() as made:
        descent_mask(torch.from_numpy(trie.subtree_ends()))
    assert made.elements < 10 * (len(trie) // 128 + 1) ** 2


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


def assert_same_blocks(mask: Any) -> None:
    expected = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")
    assert mask.seq_lengths == expected.seq_lengths
    assert mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in (f"{name}_num_blocks", f"{name}_indices"):
            found, of_whole = getattr(mask, part), getattr(expected, part)
            assert found.dtype == of_whole.dtype
            assert torch.equal(found, of_whole), part
    assert torch.equal(mask.to_dense(), expected.to_dense())


def test_more_models_than_dynamo_allows_are_compiled_in_every_thread() -> None:
    """One compilation for each number of heads, as for each base model; what is beyond the limit is not compiled."""
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def of_heads(number: int) -> None:
        allow_compilations()
        assert int(function(torch.ones(1, number, 4), number)) == 4 * number**2

    function = torch.compile(lambda heads, number: heads.sum() * number, backend=backend, dynamic=False)
    for number in range(2, 14):
        thread = Thread(target=of_heads, args=(number,))
        thread.start()
        thread.join()
    assert len(compiled) == 12


def test_a_higher_limit_of_the_user_stays() -> None:
    with torch._dynamo.config.patch(recompile_limit=100):
        allow_compilations()
        assert torch._dynamo.config.recompile_limit == 100


@pytest.mark.parametrize("seed", range(15))
def test_rows_that_are_not_read_have_no_queries(seed: int) -> None:
    trie = branching(seed, longest=200)
    rng = np.random.default_rng(seed)
    read = np.flatnonzero(rng.random(len(trie)) < rng.choice([0.1, 0.7, 1.0]))
    read = np.union1d(read, [len(trie) - 1])
    whole = [t.detach() for t in inputs(len(trie), seed, 4, 2)]
    qkv = [whole[0][:, :, read].contiguous().requires_grad_(), *(t.requires_grad_() for t in whole[1:])]
    out = tree_attention(*qkv, TreePlan.build(trie, CPU, read), 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    found = torch.autograd.grad(out, qkv, grad)
    exact = [t.detach().double().requires_grad_() for t in whole]
    expected = dense(*exact, trie, 0.3)[:, :, read]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    by_query, *by_rest = torch.autograd.grad(expected, exact, grad.double())
    for a, b in zip(found, (by_query[:, :, read], *by_rest), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def test_equal_siblings_are_one_call_and_one_shared_call() -> None:
    shared = np.arange(60)
    trie = TokenTrie.build([np.concatenate([shared, np.full(4, 200 + i)]) for i in range(8)])
    plan = TreePlan.build(trie, CPU)
    assert sizes(plan.causal) == [(1, 64, 64), (7, 4, 4)]
    assert plan.descents == [Run(1, Blocks(64, 0, 28), Blocks(0, 0, 60))]


def test_a_long_chain_is_cut_into_blocks_that_attend_to_all_before_them() -> None:
    plan = TreePlan.build(TokenTrie.build([np.arange(150)]), CPU)
    assert sizes(plan.causal) == [(2, 64, 64), (1, 22, 22)]
    assert plan.descents == [Run(1, Blocks(64, 0, 64), Blocks(0, 0, 64)), Run(1, Blocks(128, 0, 22), Blocks(0, 0, 128))]


def test_blocks_of_equal_siblings_are_one_call() -> None:
    shared = np.arange(60)
    trie = TokenTrie.build([np.concatenate([shared, np.full(130, 200 + i)]) for i in range(4)])
    plan = TreePlan.build(trie, CPU)
    # Three siblings of 130 rows hang from the first chain of 190.
    assert Run(3, Blocks(190 + 64, 130, 64), Blocks(190, 130, 64)) in plan.descents
    assert Run(3, Blocks(190 + 128, 130, 2), Blocks(190, 130, 128)) in plan.descents


def test_read_rows_at_equal_distances_are_one_call() -> None:
    read = np.concatenate([np.arange(i, i + 4) for i in (10, 20, 30)])
    plan = TreePlan.build(TokenTrie.build([np.arange(40)]), CPU, read)
    assert plan.causal == [Run(3, Blocks(0, 4, 4), Blocks(10, 10, 4))]


@pytest.mark.parametrize("seed", range(10))
def test_every_row_attends_to_its_ancestors_once(seed: int) -> None:
    trie = branching(seed, longest=300)
    rng = np.random.default_rng(seed)
    read = np.flatnonzero(rng.random(len(trie)) < rng.choice([0.2, 1.0]))
    plan = TreePlan.build(trie, CPU, read)
    times = torch.zeros(len(read), len(trie), dtype=torch.int64)
    for causal, runs in ((True, plan.causal), (False, plan.descents)):
        for run in runs:
            for i in range(run.count):
                queries, keys = (b.start + i * b.step for b in (run.queries, run.keys))
                ones = torch.ones(run.queries.length, run.keys.length, dtype=torch.int64)
                times[queries:, keys:][: len(ones), : ones.shape[1]] += ones.tril() if causal else ones
    rows, ends = torch.arange(len(trie)), torch.from_numpy(trie.subtree_ends())
    expected = (rows <= torch.from_numpy(read)[:, None]) & (torch.from_numpy(read)[:, None] < ends)
    torch.testing.assert_close(times, expected.long())


@pytest.mark.parametrize(("threads", "heads", "pieces"), [(1, 5, 1), (2, 5, 2), (2, 4, 1), (16, 8, 2), (16, 5, 3)])
def test_a_call_on_many_queries_is_work_for_every_thread(threads: int, heads: int, pieces: int) -> None:
    run = Run(1, Blocks(7, 0, 1001), Blocks(3, 0, 50))
    found = list(run.shared_among(threads, heads))
    assert found[0].count == pieces
    assert sum(r.count * r.queries.length for r in found) == 1001
    few = Run(1, Blocks(7, 0, 100), Blocks(3, 0, 50))
    assert list(few.shared_among(threads, heads)) == [few]


def test_shared_queries_give_the_gradient_of_one_call() -> None:
    trie = TokenTrie.build([np.concatenate([np.arange(60), np.full(90, 200 + i)]) for i in range(4)])
    qkv = inputs(len(trie), 0, 6, 3)
    plan = TreePlan.build(trie, CPU)
    assert any(piece.count > run.count for run in plan.descents for piece in run.shared_among(2, 3))
    grad = torch.randn(1, 6, len(trie), 16, generator=torch.Generator().manual_seed(0))
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(tree_attention(*qkv, plan, 0.3), qkv, grad))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def sizes(runs: list[Run]) -> list[tuple[int, int, int]]:
    return [(run.count, run.queries.length, run.keys.length) for run in runs]
