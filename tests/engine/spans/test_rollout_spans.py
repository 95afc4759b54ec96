"""The tree of spans knows what it was given, attention along it equals attention with a mask, and memory is bounded."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from nat_plugin_evsys.engine.sampling.kv_cache import KVLayout, SlotStore
from nat_plugin_evsys.engine.spans.attention import Level, OwnTokens, Piece, Read, SpanPlan, span_attention
from nat_plugin_evsys.engine.spans.tree import Span, SpanTree

KV_HEADS, HEADS, DIM = 2, 6, 8
LAYOUT = KVLayout(((KV_HEADS, DIM, DIM),) * 2, torch.float32, torch.device("cpu"))


def kv_of(policy: int, tokens: list[int]) -> Tensor:
    """Keys and values that depend, as a model's do, on the policy and on all tokens up to theirs."""
    out = torch.empty(2, 2, KV_HEADS, len(tokens), DIM)
    for i in range(len(tokens)):
        out[:, :, :, i] = float(hash((policy, *tokens[: i + 1])) % 1_000_003)
    return out


def fill(policy: int, last: Span) -> None:
    """What a forward pass does: compute what is not filled yet."""
    tokens = [t for span in last.path() for t in span.tokens]
    whole, at = kv_of(policy, tokens), 0
    for span in last.path():
        end = at + len(span.tokens)
        span.kv[:, :, :, span.filled :] = whole[:, :, :, at + span.filled : end]
        span.filled, at = len(span.tokens), end


def read(last: Span) -> tuple[list[int], Tensor]:
    path = last.path()
    return [t for s in path for t in s.tokens], torch.cat([s.kv for s in path], dim=3)


def check_books(tree: SpanTree) -> None:
    spans = list(tree.spans())
    assert tree.held_bytes == sum(s.kv.nbytes for s in spans if s.holders)
    assert tree.used_bytes == sum(s.kv.nbytes for s in spans if not s.holders)
    assert tree.used_bytes <= tree.max_bytes
    for span in spans:
        assert len(span.tokens) == span.kv.shape[3] > 0
        assert all(child.parent is span and child.tokens[0] == first for first, child in span.children.items())
        assert span.holders >= sum(child.holders for child in span.children.values())


@pytest.mark.parametrize("max_tokens", [0, 60, 10_000])
@pytest.mark.parametrize("seed", range(6))
def test_random_holds_find_what_was_computed(seed: int, max_tokens: int) -> None:
    rng = random.Random(seed)
    tree = SpanTree(LAYOUT, max_tokens * LAYOUT.bytes_per_token)
    held: list[tuple[int, list[int], Span]] = []
    pool: list[list[int]] = [[rng.randrange(3) for _ in range(20)]]
    hits = 0
    for _ in range(150):
        action = rng.random()
        if action < 0.5 or not held:
            base = rng.choice(pool)
            tokens = base[: rng.randint(0, len(base))] + [rng.randrange(3) for _ in range(rng.randint(1, 12))]
            pool.append(tokens)
            policy = rng.randrange(2)
            missing = tree.missing(policy, tokens)
            last, known = tree.hold(policy, tokens)
            assert known == min(len(tokens) - missing, len(tokens) - 1)
            hits += known
            if rng.random() < 0.2:
                tree.release(last)  # left before it was computed
            else:
                fill(policy, last)
                held.append((policy, tokens, last))
        elif action < 0.6:
            policy, tokens, last = rng.choice(held)
            tree.share(last, 1)
            held.append((policy, tokens, last))
        elif action < 0.8:
            policy, tokens, last = held.pop(rng.randrange(len(held)))
            more = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
            tree.add(last, more, kv_of(policy, tokens + more)[:, :, :, len(tokens) :])
            pool.append(tokens + more)
            tree.release(last)
        else:
            tree.release(held.pop(rng.randrange(len(held)))[2])
        check_books(tree)
        for policy, tokens, last in held:
            got, kv = read(last)
            assert got == tokens
            assert torch.equal(kv, kv_of(policy, tokens))
    for _, _, last in held:
        tree.release(last)
    check_books(tree)
    assert tree.held_bytes == 0
    assert hits > 0


def test_two_contexts_share_what_they_have_in_common_before_it_is_computed() -> None:
    tree = SpanTree(LAYOUT, 2**20)
    a, _ = tree.hold(0, [1, 2, 3, 4, 5])
    b, known = tree.hold(0, [1, 2, 3, 9])
    assert known == 0
    assert a.path()[0] is b.path()[0]
    assert [s.tokens for s in a.path()] == [[1, 2, 3], [4, 5]]
    assert [s.tokens for s in b.path()] == [[1, 2, 3], [9]]
    assert tree.held_bytes == 6 * LAYOUT.bytes_per_token


def test_a_conversation_stays_one_span_beside_what_others_share() -> None:
    tree = SpanTree(LAYOUT, 2**20)
    shared = list(range(10))
    for first in (20, 30):
        last, _ = tree.hold(0, [*shared, first])
        fill(0, last)
        tree.release(last)
    tokens = [*shared, 20]
    for turn in range(4):
        tokens = [*tokens, 40 + turn, 50 + turn]
        last, known = tree.hold(0, tokens)
        assert known == len(tokens) - 2
        fill(0, last)
        assert [len(s.tokens) for s in last.path()] == [10, len(tokens) - 10]
        tree.release(last)
    assert torch.equal(read(last)[1], kv_of(0, tokens))


def test_the_oldest_leaf_goes_first() -> None:
    tree = SpanTree(LAYOUT, 12 * LAYOUT.bytes_per_token)
    for tokens in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 9, 9], [7, 7, 7, 7]):
        last, _ = tree.hold(0, tokens)
        fill(0, last)
        tree.release(last)
    assert tree.missing(0, [1, 2, 9, 9]) == 0
    assert tree.missing(0, [7, 7, 7, 7]) == 0
    assert tree.missing(0, [1, 2, 3, 4]) == 2  # older than what came after it, younger for its shared part
    assert tree.missing(0, [5, 6, 7, 8]) == 0
    last, _ = tree.hold(0, [8, 8, 8])
    fill(0, last)
    tree.release(last)
    assert tree.missing(0, [5, 6, 7, 8]) == 4
    assert tree.missing(1, [7, 7, 7, 7]) == 4  # another policy's


def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One token's attention: query [heads, dim] over the listed keys [kv_heads, n, dim], in float64."""
    k, v = (t.double().repeat_interleave(HEADS // KV_HEADS, 0) for t in (key, value))
    scores = (query.double()[:, None] * k).sum(-1) * 0.3
    return (scores.softmax(-1)[..., None] * v).sum(1)


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_along_a_plan_equals_attention_token_by_token(ragged: bool) -> None:
    torch.manual_seed(0)
    layer = 1
    above, other = torch.randn(2, 2, KV_HEADS, 7, DIM), torch.randn(2, 2, KV_HEADS, 5, DIM)
    store = SlotStore(LAYOUT, 16)
    store.reserve(3, 8)
    for view in store.views(layer):
        view.normal_()
    before = [view.clone() for view in store.views(layer)]
    columns = torch.tensor([4, 1, 6] if ragged else [3, 3, 3])
    length = int(columns.max()) + 1
    hidden = torch.arange(length) > columns[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None] if ragged else None
    # Rows 0 and 2 go on from `above`, row 1 from `other`; 4 new tokens of `fresh` behind 2 old ones, below `above`.
    fresh = torch.randn(2, 2, KV_HEADS, 6, DIM)
    tokens = 7
    query, key, value = (torch.randn(1, h, tokens, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    old = fresh.clone()
    order = torch.tensor([0, 2, 3, 4, 5, 6, 1])
    plan = SpanPlan(
        tokens,
        [OwnTokens(store, slice(0, 3), columns, length, mask)],
        [Piece(3, 7, fresh, 2)],
        [Level(order, [Read(0, 6, above, 7), Read(6, 7, other, 5)]), Level(slice(3, 7), [Read(0, 4, fresh, 2)])],
    )
    got = span_attention(query, key, value, plan, layer, 0.3)[0].transpose(0, 1)
    for row, span in enumerate((above, other, above)):
        n = int(columns[row])
        keys, values = (
            torch.cat([span[layer, i], before[i][row, :, :n], new[0, :, row : row + 1]], dim=1)
            for i, new in enumerate((key, value))
        )
        assert torch.allclose(got[row].double(), masked(query[0, :, row], keys, values), atol=1e-6)
        assert torch.equal(store.views(layer)[0][row, :, n], key[0, :, row])
    for i in range(4):
        keys, values = (
            torch.cat([above[layer, j], old[layer, j, :, :2], new[0, :, 3 : 4 + i]], dim=1)
            for j, new in enumerate((key, value))
        )
        assert torch.allclose(got[3 + i].double(), masked(query[0, :, 3 + i], keys, values), atol=1e-6)
    assert torch.equal(fresh[layer, 0, :, 2:], key[0, :, 3:])
    assert torch.equal(fresh[0], old[0])
