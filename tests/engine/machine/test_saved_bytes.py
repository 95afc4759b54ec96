"""Counting what autograd keeps changes neither gradients nor checks nor lifetimes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from nat_plugin_evsys.engine.gradient.fast_verdict import fast_forward
from nat_plugin_evsys.engine.machine.memory import SavedBytes
from nat_plugin_evsys.engine.model.forward import OutputHead
from nat_plugin_evsys.engine.model.loading import wrap_model


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counts free anything."""
    gc.disable()
    yield
    gc.enable()


def weights() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    return x, w.requires_grad_(), b.requires_grad_()


def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Saves leaves, inputs, views and results (exp, softmax, tanh)."""
    return ((x @ w).exp().softmax(-1) @ b.T * w).tanh().sum() + (w * w[0]).sigmoid().norm()


def test_first_and_second_derivatives_are_the_same_to_the_bit() -> None:
    found = []
    for context in (SavedBytes([]).counting(), nullcontext()):
        x, w, b = weights()
        with context:
            loss = forward(x, w, b)
        first = torch.autograd.grad(loss, [w, b], create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), [w, b])
        found.append([*first, *second])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_leaves_get_their_gradient_through_backward() -> None:
    x, w, b = weights()
    with SavedBytes([w, b]).counting():
        forward(x, w, b).backward()
    found = (w.grad, b.grad)
    w.grad = b.grad = None
    forward(x, w, b).backward()
    assert torch.equal(found[0], w.grad)  # type: ignore[arg-type]
    assert torch.equal(found[1], b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [lambda w, y: w.add_(1), lambda w, y: y.mul_(2)], ids=["leaf", "result"])
def test_a_change_in_place_is_an_error_as_without_counting(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    for context in (SavedBytes([]).counting(), nullcontext()):
        x, w, _ = weights()
        with context:
            y = (x @ w * w).exp()
        with torch.no_grad():
            change(w, y)
        with pytest.raises(RuntimeError, match=r"in ?place"):
            y.sum().backward()


def test_each_storage_counts_once_and_frozen_ones_not_at_all() -> None:
    x, w, b = weights()
    saved = SavedBytes([w])
    with saved.counting():
        y = x @ w  # keeps x, for w
        (y.exp() * b).sum()  # keeps exp's result (twice: its own and the product's operand) and b
    assert saved.total == 3 * 5 * 5 * 8


def test_the_graph_goes_with_the_last_reference_to_it(no_collector: None) -> None:
    x, w, b = weights()
    with SavedBytes([]).counting():
        y = (x @ w).exp()
        loss = (y * b).tanh().sum()
    kept, parameter = weakref.ref(y), weakref.ref(w)
    del y, loss, w
    assert kept() is None
    assert parameter() is None


def test_a_base_model_goes_although_its_fast_path_was_found_out() -> None:
    base = wrap_model("llama", tiny_model("llama"), None)
    fast, refusal = fast_forward(base, OutputHead(base.model))
    assert fast is not None
    assert not refusal
    gone = weakref.ref(base.model)
    del base, fast
    gc.collect()
    assert gone() is None
