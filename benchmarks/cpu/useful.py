"""FLOPs of a step that no exact algorithm with frozen weights and unmerged gradients of A and B can leave out."""

from __future__ import annotations

from models import RANK
from workloads import Sequence, Shape


def useful_flops(data: list[Sequence], shape: Shape, rank: int = RANK) -> float:
    """Multiply-adds, times two, over the distinct tokens that a trained position depends on.

    Linear layers: the product, and the gradient by its input. LoRA: ``x A^T``, and three products of the same size for
    the gradients of A and B (its share of the output is free: merged weights). Attention: two products forward, four
    backward. The output head at trained positions: the logits, and the gradient by its input. In the last layer a
    token that is not trained itself has keys and values only; before the first layer nothing has a gradient.
    """
    trained = _read_tokens(data)
    rows, read = len(trained), sum(trained.values())
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    of_all, of_read = shape.linears

    def products(count: int, shapes: list[tuple[int, int]]) -> float:
        return count * sum(4 * a * b + 8 * rank / 2 * (a + b) for a, b in shapes)

    layers = (shape.layers - 1) * products(rows, of_all + of_read) + products(rows, of_all) + products(read, of_read)
    layers -= 2 * rows * shape.hidden * (query + 2 * kv)
    pairs = sum(len(key) for key in trained) * (shape.layers - 1) + sum(len(key) for key, t in trained.items() if t)
    return layers + pairs * query * 2 * (2 + 4) + read * 4 * shape.hidden * shape.vocab


def sampling_flops(data: list[Sequence], shape: Shape) -> float:
    """The same of sampling ``data`` from merged weights: every distinct token before a sampled one is read once, with
    the head wherever the next one was sampled.
    """
    sampled = _read_tokens(data)
    layer = sum(a * b for matrices in shape.linears for a, b in matrices)
    pairs = sum(len(key) for key in sampled)
    read = sum(sampled.values())
    attention = 4 * pairs * shape.heads * shape.head_dim
    return shape.layers * (2 * len(sampled) * layer + attention) + 2 * read * shape.hidden * shape.vocab


def _read_tokens(data: list[Sequence]) -> dict[tuple[int, ...], bool]:
    """Each distinct token that a sampled one depends on, with all before it, and whether a sampled one is next."""
    found: dict[tuple[int, ...], bool] = {}
    for ids, mask in data:
        last = max(i for i, m in enumerate(mask) if m)
        for i in range(last):
            key = tuple(ids[: i + 1])
            found[key] = found.get(key, False) or mask[i + 1]
    return found
