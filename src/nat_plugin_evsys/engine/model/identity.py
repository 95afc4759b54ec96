"""A cheap identity of a loaded base model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from nat_plugin_evsys.engine.machine.split_tensors import whole
from nat_plugin_evsys.engine.model.quantized import packed_name

_SAMPLES_PER_TENSOR = 16

# Settings that differ between two loads of the same weights.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "distributed_config",
        "dtype",
        "torch_dtype",
        "use_cache",
        "architectures",
        "quantization_config",
    }
)


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """Facts that a checkpoint records about its base model: all must match when it is loaded again.

    Keys: ``model_type``, ``hidden_size``, ``num_hidden_layers``, ``vocab_size``, ``config_sha256`` (the configuration
    without what changes from load to load), ``weights_sha256`` (``weight_fingerprint``), and ``quantization`` if its
    layers are packed. Paths are not part of it.
    """
    packed = packed_name(model)
    config = model.config.get_text_config()
    return ({} if packed is None else {"quantization": packed}) | {
        "model_type": model.config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "config_sha256": _config_hash(model.config.to_dict()),
        "weights_sha256": weight_fingerprint(model),
    }


def weight_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and 16 evenly spaced values of each parameter.

    The values are rounded to bfloat16 first, so that weights have one fingerprint in float32 and bfloat16. What float16
    rounds when it is loaded, such as weights stored in float32, is rounded twice and may have another.
    """
    digest = hashlib.sha256()
    samples = []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        flat = whole(parameter.detach()).reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        samples.append(flat[::step][:_SAMPLES_PER_TENSOR].to(torch.bfloat16).cpu())
    digest.update(torch.cat(samples).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _config_hash(config: dict[str, Any]) -> str:
    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stable(item) for key, item in value.items() if key not in _VOLATILE}
        return value

    return hashlib.sha256(json.dumps(stable(config), sort_keys=True, default=str).encode()).hexdigest()
