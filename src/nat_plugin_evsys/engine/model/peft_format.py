"""An adapter in PEFT's file format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.targets import fused_experts
from nat_plugin_evsys.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"

_PREFIX = "base_model.model."

_EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Projections of experts, as checkpoints from before transformers 5 name them."""


def to_peft_names(adapter: LoraAdapter) -> dict[str, Tensor]:
    """``base_model.model.<module>.lora_A.weight`` and ``…lora_B.weight``, fp32 on the CPU."""
    return {_PREFIX + name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter.named_tensors()}


def name_of_parameter(of_peft: str) -> str:
    """The adapter's name of a parameter of a loaded PEFT model: without the prefix and PEFT's name of the adapter."""
    return of_peft.removeprefix(_PREFIX).replace(".default.", ".")


def from_peft_names(tensors: Mapping[str, Tensor], targets: Iterable[str], path: Path) -> dict[str, Tensor]:
    """The reverse of ``to_peft_names``.

    Raises:
        CheckpointError: a target's tensor is missing.
    """
    names = [f"{target}.lora_{side}.weight" for target in targets for side in "AB"]
    for name in names:
        if _PREFIX + name not in tensors:
            raise CheckpointError(f"checkpoint {path}: adapter_model.safetensors lacks {_PREFIX}{name}")
    return {name: tensors[_PREFIX + name] for name in names}


def adapter_config(base: BaseModel, adapter: LoraAdapter) -> dict[str, Any]:
    """The contents of ``adapter_config.json``.

    ``ensure_weight_tying`` stays false: with tied embeddings a delta on ``lm_head`` is one on the logits only. (PEFT's
    ``merge_and_unload`` of such an adapter would write into the shared embedding; untie the head before merging.)
    """
    modules, parameters = _targets(base, list(adapter.weights))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model.config._name_or_path or base.name,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(isinstance(base.model.get_submodule(name), Conv1D) for name in adapter.weights),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
    }


def _targets(base: BaseModel, targets: list[str]) -> tuple[list[str], list[str]]:
    """``(target_modules, target_parameters)``.

    In a model with fused experts PEFT takes every module with the name of an expert's projection for routed experts and
    drops it, dense layers and shared experts too; named by their weights they are left as they are.
    """
    if not fused_experts(base.model):
        return target_modules(base.model, targets), []
    by_weight = [name for name in targets if name.rsplit(".", 1)[-1] in _EXPERT_NAMES]
    modules = [name for name in targets if name not in by_weight]
    if not by_weight:
        return target_modules(base.model, modules), []
    return sorted(modules), [f"{name}.weight" for name in sorted(by_weight)]


def target_modules(model: nn.Module, targets: list[str]) -> list[str]:
    """Leaf names such as ``q_proj`` where they select exactly ``targets`` in this model, else the full names."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in targets})
    selected = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in leaves]
    return leaves if set(selected) == set(targets) else sorted(targets)
