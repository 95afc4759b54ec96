"""A base model split over the processes of a torch process group, by transformers' own tensor-parallel plan.

Each process holds its part of the decoder's linear layers, and the whole of everything else: embedding, norms, output
head, LoRA matrices. The layers compute with DTensors, which know what is split and what is a partial sum, so the
gradient of a LoRA matrix is the whole one, and the same, in every process.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nat_plugin_evsys.engine.machine.split_tensors import is_dtensor
from nat_plugin_evsys.engine.model.lora import LoraLinear, active_pair
from nat_plugin_evsys.errors import ModelError

_STYLES = frozenset({"colwise", "rowwise", "replicated_with_grad_allreduce"})
"""Those of dense decoders. Others split experts or latent attention, where LoRA's part was not worked out."""


def loading_options(base_model: str, where: str | Path, parts: int, **options: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load this process's part of ``parts``; the process group must exist.

    Raises:
        ModelError: transformers has no plan for the model, or one that this engine does not follow.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as exc:
        raise ModelError("a model is split by transformers 5.21 or newer; pip install -U transformers") from exc
    config = AutoConfig.from_pretrained(where, **options)
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    layers = {name: style for name, style in plan.items() if "layers." in name}
    strange = sorted(set(layers.values()) - _STYLES)
    if not layers or strange:
        why = f"a plan with {', '.join(strange)}" if strange else "no plan"
        raise ModelError(f"base_model {base_model!r} cannot be split: transformers has {why} for {config.model_type}")
    uneven = [n for n in ("num_attention_heads", "num_key_value_heads") if (getattr(config, n, None) or parts) % parts]
    if uneven:
        raise ModelError(f"base_model {base_model!r} cannot be split into {parts}: {uneven[0]} is not a multiple of it")
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    prefix = model_class.base_model_prefix
    whole = {f"{prefix}.{name}": style for name, style in layers.items()}
    return {"distributed_config": DistributedConfig(tp_plan=whole, tp_size=parts)}


def install(model: PreTrainedModel) -> None:
    """Let the split layers of a loaded model add their part of the active adapter's delta.

    transformers has put a function of its own before each of them, which keeps the layer's former ``forward`` and would
    pass the adapter by: it is put before ``SplitLoraLinear``'s again.
    """
    if not is_split(model):
        return
    from transformers.distributed import tensor_parallel

    styles: Any = tensor_parallel.ALL_PARALLEL_STYLES  # type: ignore[attr-defined]  # it is not in their __all__
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and "forward" in vars(module):
            weight: Any = module.weight
            del module.forward
            module.__class__ = SplitLoraLinear
            module.mesh = weight.device_mesh
            style = styles[model.tp_plan[re.sub(r"\d+", "*", name)]]
            style.install_forward(module, weight.device_mesh)


def is_split(model: nn.Module) -> bool:
    """Whether this process has a part of the model only."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


class SplitLoraLinear(LoraLinear):
    """The part of a linear layer, and of the active adapter's delta, that is this process's."""

    mesh: Any

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``: DTensors where gradients are wanted, else this process's parts."""
        out = F.linear(x, self.weight, self.bias)
        adapter, pair = active_pair(self.lora_name)
        if adapter is None or pair is None:
            return out
        a, b = (matrix.to(x.dtype) for matrix in pair)
        if is_dtensor(x):
            from torch.distributed.tensor import DTensor, Replicate

            a, b = (DTensor.from_local(each, self.mesh, [Replicate()], run_check=False) for each in (a, b))
        else:
            a = self._part(a, 1, self.weight.shape[1])
            b = self._part(b, 0, self.weight.shape[0])
        return out + F.linear(F.linear(x, a), b) * adapter.scale

    def _part(self, matrix: Tensor, dim: int, size: int) -> Tensor:
        """Along ``dim``, what belongs to a weight of that size here."""
        if matrix.shape[dim] == size:
            return matrix
        part: Tensor = torch.chunk(matrix, self.mesh.size(), dim)[self.mesh.get_local_rank()]
        return part
