"""LoRA as plain tensors outside the model, so that many adapters can share one frozen base model.

``y = W x + (alpha / rank) * B A x`` (arXiv 2106.09685). The base model's linear layers add the delta of whichever
adapter is *active in the current context*: a plain ``nn.Linear`` becomes a ``LoraLinear``, other kinds of linear layers
get a forward hook. A training thread and a sampling thread can therefore run the same model with different
adapters without affecting each other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nat_plugin_evsys.engine.model.lora_linear import lora_linear
from nat_plugin_evsys.engine.model.targets import linear_roles, select_targets
from nat_plugin_evsys.errors import ModelError

LoraWeights = dict[str, tuple[Tensor, Tensor]]
"""Module name -> ``(A [rank, in_features], B [out_features, rank])``."""

_RANDOM_STD = 0.05

_ACTIVE: ContextVar[LoraAdapter | None] = ContextVar("evsys_active_lora", default=None)
_FUSED: ContextVar[bool] = ContextVar("evsys_fused_lora", default=True)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One set of LoRA matrices.

    Attributes:
        rank: r.
        alpha: the delta is scaled by ``alpha / rank``.
        weights: the matrices by module name. In a trainable adapter these are fp32 leaves that require grad; in a
            snapshot they are detached copies that nothing writes to.
    """

    rank: int
    alpha: float
    weights: LoraWeights

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @classmethod
    def create(
        cls,
        model: PreTrainedModel,
        *,
        rank: int,
        alpha: float,
        seed: int | None = 0,
        train_attn: bool = True,
        train_mlp: bool = True,
        train_unembed: bool = False,
    ) -> LoraAdapter:
        """A fresh trainable adapter: A kaiming-uniform with a = sqrt(5) as PEFT makes it, B zero.

        A module's A depends on the seed and the module's name only, not on what else is adapted. ``seed=None`` draws
        a seed from the operating system.

        Raises:
            ModelError: rank or alpha is not positive, or the model lacks a selected target.
        """
        if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
            raise ModelError(f"lora rank and alpha must be positive, got rank={rank}, alpha={alpha}")
        names = select_targets(model, train_attn=train_attn, train_mlp=train_mlp, train_unembed=train_unembed)
        base_seed = torch.seed() if seed is None else seed
        weights: LoraWeights = {}
        for name in names:
            linear = model.get_submodule(name)
            a, b = _initial_pair(linear, rank, f"{base_seed}:{name}")
            weights[name] = (a.requires_grad_(), b.requires_grad_())
        return cls(rank=rank, alpha=float(alpha), weights=weights)

    def snapshot(self, dtype: torch.dtype | None = None) -> LoraAdapter:
        """A frozen, detached copy (in ``dtype`` if given); later training does not touch it."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype=dtype or tensor.dtype, copy=True)

        return LoraAdapter(self.rank, self.alpha, {n: (copy(a), copy(b)) for n, (a, b) in self.weights.items()})

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``(<module>.lora_A.weight | <module>.lora_B.weight, tensor)`` in a fixed order."""
        for name, (a, b) in self.weights.items():
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", b

    def delta(self, name: str, x: Tensor) -> Tensor | None:
        """``scale * B(A(x))`` for module ``name``: ``x [..., in] -> [..., out]`` in x's dtype; None if not adapted."""
        pair = self.weights.get(name)
        if pair is None:
            return None
        a, b = (weight.to(x.dtype) for weight in pair)
        return F.linear(F.linear(x, a), b) * self.scale


def _initial_pair(linear: nn.Module, rank: int, key: str) -> tuple[Tensor, Tensor]:
    """``(A, B)`` in fp32 on the layer's device; drawn on the CPU so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    outputs, inputs = linear_shape(linear)
    bound = 1.0 / math.sqrt(inputs)
    a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
    device = linear.get_parameter("weight").device
    return a.to(device), torch.zeros(outputs, rank, device=device)


def random_adapter(
    model: PreTrainedModel, names: Iterable[str], *, rank: int = 4, alpha: float = 8.0, seed: int = 0
) -> LoraAdapter:
    """Random matrices on the layers ``names``, for probes: unlike a fresh adapter's, their delta is not zero."""
    generator = torch.Generator().manual_seed(seed)

    def pair(linear: nn.Module) -> tuple[Tensor, Tensor]:
        outputs, inputs = linear_shape(linear)
        a, b = torch.empty(rank, inputs), torch.empty(outputs, rank)
        for matrix in (a, b):
            matrix.normal_(0, _RANDOM_STD, generator=generator)
        device = linear.get_parameter("weight").device
        return a.to(device), b.to(device)

    return LoraAdapter(rank, alpha, {name: pair(model.get_submodule(name)) for name in names})


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """``(out, in)``; ``Conv1D`` keeps its weight the other way round, and a packed weight has another shape."""
    if isinstance(linear, Conv1D):
        inputs, outputs = linear.weight.shape
        return outputs, inputs
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


@contextmanager
def applied(adapter: LoraAdapter | None, *, fused: bool = True) -> Iterator[None]:
    """Forward passes inside the ``with`` block, in this thread or task, use ``adapter`` (None: the bare base model).

    ``fused=False`` computes the delta as its formula says, operation by operation; it is what tests compare with.
    """
    token, fused_token = _ACTIVE.set(adapter), _FUSED.set(fused)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        _FUSED.reset(fused_token)


def active_pair(name: str) -> tuple[LoraAdapter | None, tuple[Tensor, Tensor] | None]:
    """The adapter that is active here, and its matrices ``(A, B)`` of module ``name``; None for what is not there."""
    adapter = _ACTIVE.get()
    return adapter, None if adapter is None else adapter.weights.get(name)


class LoraLinear(nn.Linear):
    """A plain ``nn.Linear`` after ``install``, in place: the same layer plus the active adapter's delta."""

    lora_name: str

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        adapter, pair = active_pair(self.lora_name)
        if adapter is None or pair is None:
            return F.linear(x, self.weight, self.bias)
        if not _FUSED.get():
            delta = adapter.delta(self.lora_name, x)
            assert delta is not None
            return F.linear(x, self.weight, self.bias) + delta
        a, b = (weight.to(x.dtype) for weight in pair)
        return lora_linear(x, self.weight, self.bias, a, b, adapter.scale)


def install(model: PreTrainedModel) -> None:
    """Make every linear layer that can be adapted add the active adapter's delta. Idempotent."""
    if getattr(model, "_evsys_lora_installed", False):
        return
    for name in linear_roles(model):
        module = model.get_submodule(name)
        if type(module) is nn.Linear:
            module.__class__ = LoraLinear
            module.lora_name = name  # type: ignore[assignment]  # mypy does not follow __class__
        else:
            module.register_forward_hook(_hook(name))
    model._evsys_lora_installed = True  # type: ignore[assignment]  # torch knows tensors and modules only


def _hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def add_delta(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        adapter = _ACTIVE.get()
        if adapter is None:
            return None
        delta = adapter.delta(name, args[0])
        return None if delta is None else output + delta

    return add_delta
