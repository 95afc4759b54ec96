"""transformers' own decoder layers, computed again in the backward pass instead of kept for it.

transformers' gradient checkpointing is a switch of the model and acts in train mode only; several threads share one
model here. So whether a layer is computed again is asked of the context that calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Surroundings = Callable[[], AbstractContextManager[None]]

_ACTIVE: ContextVar[Surroundings | None] = ContextVar("evsys_recomputed_layers", default=None)


def install(decoder: nn.Module) -> int:
    """Let the layers of ``decoder`` be computed again inside ``recomputing``; elsewhere they stay what they were.

    Returns how many there are: 0 where transformers does not know them as layers to checkpoint. Idempotent.
    """
    layers = list(_layers(decoder))
    for layer in layers:
        kind: Any = type(layer)
        if not issubclass(kind, _RecomputedLayer):
            layer.__class__ = _recomputed(kind)
    return len(layers)


@contextmanager
def recomputing(surroundings: Surroundings) -> Iterator[None]:
    """Forward passes in this thread or task keep the inputs of each layer only, if its decoder is ``install``ed.

    Args:
        surroundings: makes the context that a layer is computed in, then and again: on a GPU the backward pass runs in
            a thread of autograd's own.
    """
    token = _ACTIVE.set(surroundings)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _layers(child)


class _RecomputedLayer(nn.Module):
    """What is put before a layer's own class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        surroundings, call = _ACTIVE.get(), super().__call__
        if surroundings is None:
            return call(*args, **kwargs)

        def run(*given: Any) -> Any:
            with surroundings():
                return call(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        # By position, since only such tensors are kept as autograd keeps them.
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name: transformers goes by names."""
    return type(kind.__name__, (_RecomputedLayer, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
