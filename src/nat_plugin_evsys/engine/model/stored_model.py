"""Reading a base model's files, from this machine or from the Hugging Face hub."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.engine.model import quantized, tensor_parallel
from nat_plugin_evsys.engine.model.source import WHAT_TO_TYPE, LocalSource
from nat_plugin_evsys.engine.model.vision import auto_class, load_image_processor
from nat_plugin_evsys.errors import ConfigError, ModelError, one_line
from nat_plugin_evsys.runtime.defaults import QUANTIZATION

LOADING = threading.Lock()
"""transformers patches its modules while it loads: of two loads at once, one misses tied weights, and so does every
later one."""

_HUB_TIMEOUT_S = 8.0


class StoredModel(NamedTuple):
    """What a model's directory has; ``image_processor`` is None where nothing reads images."""

    tokenizer: Any
    model: PreTrainedModel
    image_processor: Any


def load_from_hub(hub_id: str, **options: Any) -> StoredModel:
    """Load from the Hugging Face cache if the model is complete there, else download it."""
    import huggingface_hub
    from huggingface_hub import constants

    if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, "config.json"), str):
        try:
            return load_stored(hub_id, None, local_files_only=True, **options)
        except ModelError:
            # An interrupted download leaves a partial cache, which only the hub can complete.
            if constants.HF_HUB_OFFLINE:
                raise
    elif constants.HF_HUB_OFFLINE:
        raise ModelError(f"base_model {hub_id!r} is not cached here and HF_HUB_OFFLINE is set; {WHAT_TO_TYPE}")
    try:
        huggingface_hub.model_info(hub_id, timeout=_HUB_TIMEOUT_S)
    except Exception as exc:
        # Boundary: the hub client raises HTTP, DNS and validation errors alike.
        raise ModelError(
            f"base_model {hub_id!r} is not a directory here, and the Hugging Face hub did not provide it: "
            f"{one_line(exc)}; {WHAT_TO_TYPE}"
        ) from exc
    return load_stored(hub_id, None, **options)


def load_stored(
    base_model: str,
    source: LocalSource | None,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    quantization: str,
    device: torch.device,
    parts: int = 1,
    local_files_only: bool = False,
) -> StoredModel:
    """All of a model from ``source``, else from the hub (or, with ``local_files_only``, from its cache)."""
    where = base_model if source is None else source.directory
    common: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": trust_remote_code}
    for_tokenizer = common | (source.tokenizer_options() if source else {})
    for_model = common | (source.model_options() if source else {})
    stored: dict[str, Any] = {}
    if source is None or source.gguf_file is None:
        stored = _stored_config(where, common)
        packing = stored.get("quantization_config")
        for_model |= quantized.loading_options(base_model, quantization, packing, dtype, device)
    elif quantization != QUANTIZATION:
        raise ConfigError(f"base_model {base_model!r} is a GGUF file, which is unpacked; set quantization to none")
    if parts > 1:
        if for_model.keys() & {"gguf_file", "quantization_config"}:
            raise ConfigError(f"base_model {base_model!r}: a packed model is not split; set quantization to none")
        for_model |= tensor_parallel.loading_options(base_model, where, parts, **common)
    try:
        with LOADING, quantized.quiet_about_merging():
            tokenizer = AutoTokenizer.from_pretrained(where, **for_tokenizer)
            loader = auto_class(stored.get("model_type"))
            loaded: Any = loader.from_pretrained(where, dtype=dtype, output_loading_info=True, **for_model)
            image_processor = load_image_processor(where, stored.get("model_type"), **common)
    except Exception as exc:
        # Boundary: transformers raises many types; all become one readable line.
        raise ModelError(
            f"base_model {base_model!r} cannot be loaded from {source or where}: {one_line(exc)}"
            f"{_if_memory_ran_out(exc, source, device)}"
        ) from exc
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"base_model {base_model!r}: the weight files lack {len(missing)} tensors (first: {missing[0]}); "
            "the directory is incomplete, download or save the model again"
        )
    if quantized.packed_layers(model):
        quantized.compute_in(model, dtype)
    elif quantization != QUANTIZATION:
        raise ModelError(
            f"base_model {base_model!r} has no layer that quantization {quantization} reaches; set it to none"
        )
    elif for_model.keys() & {"gguf_file", "quantization_config"}:
        quantized.forget(model)
    return StoredModel(tokenizer, model, image_processor)


def _if_memory_ran_out(exc: Exception, source: LocalSource | None, device: torch.device) -> str:
    """What is needed and what there is, "" after another error."""
    if not isinstance(exc, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(exc):
        return ""
    files = [] if source is None else [source.gguf_file or f for f in source.directory.glob("*.safetensors")]
    size = sum(file.stat().st_size for file in files)
    needed = f"its weight files have {size / 1e9:.2f} GB, and " if size else ""
    return (
        f"; {needed}this process may have {free_bytes(device) / 1e9:.2f} GB more; raise its limit (ulimit -v, the "
        "container's memory), or take a smaller model, dtype: bfloat16 or quantization: nf4"
    )


def _stored_config(where: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config.json, empty without one; what is wrong there, the load says."""
    options = {name: value for name, value in options.items() if name != "trust_remote_code"}
    try:
        config, _ = PretrainedConfig.get_config_dict(where, **options)
    except (OSError, ValueError):
        return {}
    return dict(config)
