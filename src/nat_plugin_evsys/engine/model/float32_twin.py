"""A base model of few bits computed in float32: what two orders of the same sums are measured against."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nat_plugin_evsys.engine.model.plain_copy import plain_copy


def float32_twin(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` without an adapter, each module's own tensors in float32 while it runs; the others keep their dtype.

    No second copy of the weights is made: more than one module's tensors are never in float32.
    """
    twin = plain_copy(model)
    for module in twin.modules():
        if any(
            t is not None and t.is_floating_point() for t in (*module._parameters.values(), *module._buffers.values())
        ):
            _Widened(module)
    return twin


class _Widened:
    """The hooks of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._own: list[tuple[dict[str, Any], str, Tensor]] = []
        module.register_forward_pre_hook(self._widen)
        module.register_forward_hook(self._restore, always_call=True)

    def _widen(self, module: nn.Module, args: Any) -> None:
        both: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in both:
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor.is_floating_point():
                    self._own.append((tensors, name, tensor))
                    wide = tensor.detach().float()
                    tensors[name] = nn.Parameter(wide, requires_grad=False) if tensors is module._parameters else wide

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensors, name, tensor in self._own:
            tensors[name] = tensor
        self._own.clear()
