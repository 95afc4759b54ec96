"""A step's time by what it is spent on, from torch's own profile."""

from __future__ import annotations

import torch
from models import RANK
from time_split import KINDS, split
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from workloads import Shape

SHAPE = Shape(vocab=4_000, hidden=640)


def test_each_operation_is_of_its_kind() -> None:
    x, head = torch.randn(256, SHAPE.hidden), torch.randn(SHAPE.hidden, SHAPE.vocab)
    frozen, a = torch.randn(SHAPE.hidden, 1_000), torch.randn(SHAPE.hidden, 2 * RANK)
    query = torch.randn(1, 2, 256, 64)
    work = {
        "attention": lambda: scaled_dot_product_attention(query, query, query, is_causal=True),
        "products": lambda: x @ frozen,
        "head": lambda: x @ head,
        "LoRA": lambda: x @ a,
        "other": lambda: torch.softmax(x, -1),
    }
    assert set(work) == set(KINDS)
    for kind, operation in work.items():
        operation()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(20):  # so that one slow moment of the machine does not decide
                operation()
        spent = split(profiler.key_averages(group_by_input_shape=True), SHAPE, on_gpu=False)
        named = {each for each, seconds in spent.items() if seconds > 0} - {"other"}  # that has a part of every call
        assert named == {kind} - {"other"}, spent
        assert max(spent, key=lambda k: spent[k]) == kind, spent
