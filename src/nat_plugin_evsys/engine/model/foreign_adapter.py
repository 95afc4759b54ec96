"""A LoRA adapter that PEFT wrote, or another program in its format, as far as this engine computes the same with it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nat_plugin_evsys.engine.model.peft_format import ADAPTER, ADAPTER_CONFIG
from nat_plugin_evsys.errors import CheckpointError

_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

_OTHER_FORMULAS = {
    "use_dora": "DoRA",
    "rank_pattern": "ranks that differ by module",
    "alpha_pattern": "alphas that differ by module",
    "modules_to_save": "whole modules beside the LoRA matrices",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained embeddings of single tokens",
}
"""Settings of PEFT's LoraConfig that change what an adapter computes, and what they stand for."""


@dataclass(frozen=True)
class ForeignAdapter:
    """What a PEFT directory holds.

    Attributes:
        base_model: the name that its author loaded the base model by.
        alpha: for the scale ``alpha / rank``. rsLoRA's scale is ``alpha / sqrt(rank)`` (arXiv 2312.03732), so of such
            an adapter it is ``alpha * sqrt(rank)``.
        targets: names of the adapted modules.
    """

    base_model: str
    rank: int
    alpha: float
    targets: list[str]


def read_foreign_adapter(directory: Path) -> ForeignAdapter:
    """The facts of a PEFT directory; its matrices are not loaded.

    Raises:
        CheckpointError: it cannot be read, is no LoRA adapter, or computes by another formula; the message names it.
    """
    config = _config(directory)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory} is a PEFT adapter of type {config.get('peft_type')}; only LORA is trained")
    other = next((name for name in _OTHER_FORMULAS if config.get(name)), None)
    if other is not None:
        raise CheckpointError(f"{directory} has {_OTHER_FORMULAS[other]} ({other}), which this engine does not compute")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise CheckpointError(f"{directory} has trained biases, which this engine does not compute")
    sides: dict[str, set[str]] = {}
    for name in _tensor_names(directory):
        match = _MATRIX.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{directory}: {ADAPTER} has {name}, which is no LoRA matrix of a linear layer")
        sides.setdefault(match["module"], set()).add(match["side"])
    torn = [module for module, found in sides.items() if found != {"A", "B"}]
    if torn or not sides:
        raise CheckpointError(f"{directory}: {ADAPTER} lacks {f'a matrix of {torn[0]}' if torn else 'LoRA matrices'}")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: {ADAPTER_CONFIG} has no usable r and lora_alpha ({error})") from error
    scaled = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return ForeignAdapter(str(config.get("base_model_name_or_path") or ""), rank, scaled, sorted(sides))


def _config(directory: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} cannot be read: {error}") from error
    return config


def _tensor_names(directory: Path) -> list[str]:
    if not (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{directory} has no {ADAPTER}; save it with `save_pretrained(…, safe_serialization=True)`"
        )
    try:
        with safe_open(directory / ADAPTER, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / ADAPTER} cannot be read: {error}") from error
