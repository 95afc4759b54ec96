"""Trie attention against dense attention under the mask that the trie's definition gives."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from nat_plugin_evsys.engine.flex_attention import flex_tree_attention
from nat_plugin_evsys.engine.tree_attention import TreePlan, tree_attention
from nat_plugin_evsys.engine.trie import TokenTrie

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
@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_has_the_same_output(seed: int) -> None:
    trie = branching(seed)
    qkv = [t.detach() for t in inputs(len(trie), seed, 4, 2)]
    plan = TreePlan.build(trie, CPU)
    torch.testing.assert_close(
        flex_tree_attention(*qkv, plan.block_mask, 0.3), tree_attention(*qkv, plan, 0.3), rtol=1e-5, atol=1e-5
    )


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
    assert [(r.count, r.length) for r in plan.causal] == [(1, 64), (7, 4)]
    assert [(d.query_end - d.query_start, d.key_end - d.key_start) for d in plan.descents] == [(28, 60)]


def test_a_long_chain_is_cut_into_blocks_that_attend_to_all_before_them() -> None:
    plan = TreePlan.build(TokenTrie.build([np.arange(150)]), CPU)
    assert [(r.count, r.length) for r in plan.causal] == [(2, 64), (1, 22)]
    assert [(d.query_start, d.query_end, d.key_start, d.key_end) for d in plan.descents] == [
        (64, 128, 0, 64),
        (128, 150, 0, 128),
    ]


def test_read_rows_at_equal_distances_are_one_call() -> None:
    read = np.concatenate([np.arange(i, i + 4) for i in (10, 20, 30)])
    plan = TreePlan.build(TokenTrie.build([np.arange(40)]), CPU, read)
    assert [(r.query_start, r.key_start, r.key_step, r.count, r.length) for r in plan.causal] == [(0, 10, 10, 3, 4)]
