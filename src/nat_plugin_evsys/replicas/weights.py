"""LoRA matrices on their way to replicas: one vector of float32, stored once in Ray's object store."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nat_plugin_evsys.engine.model.lora import LoraAdapter, LoraWeights

Flat = NDArray[np.float32]
"""All matrices of an adapter after one another, in the order of ``LoraAdapter.named_tensors``."""

Shape = tuple[int, float, tuple[tuple[str, int, int], ...]]
"""``(rank, alpha, ((module, in_features, out_features), …))``."""


@dataclass(frozen=True)
class Weights:
    """The values of an adapter. Whoever holds this can fetch them, from whichever node has them.

    Attributes:
        key: unique; equal keys have equal values.
        digest: SHA-256 of the values, where a replica has to compare its own with it.
        values: reference to a ``Flat``.
    """

    key: str
    shape: Shape
    digest: str | None
    values: Any


def shape_of(adapter: LoraAdapter) -> Shape:
    """What an adapter of the same form is made from."""
    modules = ((name, a.shape[1], b.shape[0]) for name, (a, b) in adapter.weights.items())
    return adapter.rank, adapter.alpha, tuple(modules)


def empty_adapter(shape: Shape, model: torch.nn.Module) -> LoraAdapter:
    """A trainable adapter of that form, all zeros, each matrix on the device of its layer."""
    rank, alpha, modules = shape
    weights: LoraWeights = {}
    for name, inputs, outputs in modules:
        device = model.get_parameter(f"{name}.weight").device
        a, b = torch.zeros(rank, inputs, device=device), torch.zeros(outputs, rank, device=device)
        weights[name] = (a.requires_grad_(), b.requires_grad_())
    return LoraAdapter(rank, alpha, weights)


def flatten(adapter: LoraAdapter) -> Flat:
    """A copy of the values; bfloat16 fits in float32 without loss."""
    tensors = [tensor.detach().reshape(-1).float().cpu() for _, tensor in adapter.named_tensors()]
    return torch.cat(tensors).numpy()


def fill(adapter: LoraAdapter, values: Flat) -> None:
    """Copy values into the adapter's tensors."""
    parts = split(adapter, torch.from_numpy(values.copy()))  # the object store's memory is read-only
    with torch.no_grad():
        for name, tensor in adapter.named_tensors():
            tensor.copy_(parts[name])


def split(adapter: LoraAdapter, flat: Tensor) -> dict[str, Tensor]:
    """Views of ``flat`` in the form of the adapter's tensors, by name."""
    named = dict(adapter.named_tensors())
    parts = flat.split([tensor.numel() for tensor in named.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(named.items(), parts, strict=True)}


def digest(values: Flat) -> str:
    """SHA-256 of the values' bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def publish(adapter: LoraAdapter, values: Flat, *, check: bool) -> Weights:
    """Store values where every replica can fetch them; they are freed with the last reference.

    ``check``: a replica compares what it computes with to the values' hash.
    """
    import ray

    return Weights(uuid.uuid4().hex, shape_of(adapter), digest(values) if check else None, ray.put(values))
