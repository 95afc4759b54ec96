"""Loading the frozen base model and its tokenizer."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.engine.model import long_rope, lora, quantized
from nat_plugin_evsys.engine.model.builtin import PREFIX, builtin_tokenizer
from nat_plugin_evsys.engine.model.identity import model_identity
from nat_plugin_evsys.engine.model.source import WHAT_TO_TYPE, LocalSource, find_local
from nat_plugin_evsys.errors import ConfigError, ModelError
from nat_plugin_evsys.runtime.defaults import QUANTIZATION

logger = logging.getLogger(__name__)

# transformers patches its modules while it loads: of two loads at once, one misses tied weights, and so does every
# later one.
_LOADING = threading.Lock()

_HUB_TIMEOUT_S = 8.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(eq=False)
class BaseModel:
    """A frozen causal language model in eval mode, with the LoRA hooks installed.

    Attributes:
        name: what the user typed as ``base_model``.
        model: transformers model; no parameter requires grad.
        tokenizer: its Hugging Face tokenizer.
        device, dtype: where the weights live and in which precision.
        context_length: most tokens that one sequence may have.
        vocab_size: rows of the output head; every token id must be below it.
        identity: what a checkpoint is matched against, see ``identity.model_identity``.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    context_length: int
    vocab_size: int
    identity: dict[str, Any]


def load_base_model(
    base_model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context_length: int | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
    quantization: str = QUANTIZATION,
) -> BaseModel:
    """Load ``builtin/<name>``, a local directory, a GGUF file (or the one in a directory) or a Hugging Face hub id.

    ``device="auto"`` is CUDA when present, else the CPU. ``dtype="auto"`` is bfloat16 on a GPU that has it and float32
    elsewhere. A hub model that is already in the Hugging Face cache is loaded from there without any network access.
    ``quantization``: ``none``, or one of ``quantized.PACKED``, which packs the linear layers.

    Raises:
        ModelError: the model cannot be found or loaded, or its tokenizer is larger; the message says what to type.
        ConfigError: unknown device, dtype or quantization.
    """
    where = resolve_device(device)
    precision = _resolve_dtype(dtype, where)
    options: dict[str, Any] = {
        "dtype": precision,
        "trust_remote_code": trust_remote_code,
        "quantization": quantization,
        "device": where,
    }
    source = find_local(base_model, cache_dir or default_cache_dir())
    if source is not None:
        tokenizer, model = _load(base_model, source, **options)
    else:
        tokenizer, model = _load_from_hub(base_model, **options)
    model.to(where)  # type: ignore[arg-type]  # transformers wraps .to() without its overloads
    base = wrap_model(base_model, model, tokenizer, context_length=context_length)
    _check_tokenizer(base)
    return base


def load_tokenizer(base_model: str, *, cache_dir: Path | None = None) -> Any:
    """Only the tokenizer of what ``load_base_model`` loads; reads no weights (and builds no builtin model).

    Raises:
        ModelError: it cannot be found or loaded; the message says what to type.
    """
    cache = cache_dir or default_cache_dir()
    if base_model.startswith(PREFIX):
        return builtin_tokenizer(base_model, cache)
    source = find_local(base_model, cache)
    try:
        with _LOADING:
            if source is None:
                return AutoTokenizer.from_pretrained(base_model)
            return AutoTokenizer.from_pretrained(source.directory, **source.tokenizer_options())
    except Exception as exc:
        # Boundary: transformers and the hub client raise many types; all become one readable line.
        raise ModelError(f"the tokenizer of {base_model!r} cannot be loaded: {one_line(exc)}") from exc


def wrap_model(name: str, model: PreTrainedModel, tokenizer: Any, *, context_length: int | None = None) -> BaseModel:
    """A ``BaseModel`` around a loaded transformers model: frozen, in eval mode, LoRA hooks installed.

    Raises:
        ModelError: ``context_length`` is larger than the model was built for, or it has no output head.
    """
    model.eval().requires_grad_(False)
    quantized.keep_differentiable(model)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"base_model {name!r}: {type(model).__name__} has no output head; choose a causal language model"
        )
    quantized.check_head(name, model)
    lora.install(model)
    long_rope.install(model)
    return BaseModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=head.weight.device,
        dtype=head.weight.dtype,
        context_length=_resolve_context(name, model, context_length),
        vocab_size=int(head.weight.shape[0]),
        identity=model_identity(model),
    )


def default_cache_dir() -> Path:
    """``$EVSYS_CACHE``, else ``~/.cache/nat_plugin_evsys``."""
    return Path(os.environ.get("EVSYS_CACHE") or "~/.cache/nat_plugin_evsys").expanduser()


def _check_tokenizer(base: BaseModel) -> None:
    # Without added tokens: transformers adds some to what it reads from GGUF, and a prompt that has one is refused.
    known = int(getattr(base.tokenizer, "vocab_size", 0))
    if known > base.vocab_size:
        raise ModelError(
            f"base_model {base.name!r}: its tokenizer has {known} tokens, and the model knows {base.vocab_size}; use "
            f"the tokenizer that it was trained with, or save the model after model.resize_token_embeddings({known})"
        )


def resolve_device(device: str) -> torch.device:
    """The device of a setting; ``auto`` is CUDA when present. Raises ConfigError: unknown, or not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as exc:
        raise ConfigError(f"device {device!r} is not a torch device; use auto, cpu, cuda or cuda:<n>") from exc
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: this torch sees no CUDA GPU; use device: cpu or auto")
    return resolved


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if on_gpu else torch.float32
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _resolve_context(name: str, model: PreTrainedModel, asked: int | None) -> int:
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        if longest is None:
            raise ModelError(f"base_model {name!r} states no max_position_embeddings; set context_length")
        return longest
    if asked < 2 or (longest is not None and asked > longest):
        raise ModelError(f"context_length {asked} does not fit base_model {name!r}; use 2 to {longest}")
    return asked


def _load_from_hub(hub_id: str, **options: Any) -> tuple[Any, PreTrainedModel]:
    """Load from the Hugging Face cache if the model is complete there, else download it."""
    import huggingface_hub
    from huggingface_hub import constants

    if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, "config.json"), str):
        try:
            return _load(hub_id, None, local_files_only=True, **options)
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
    return _load(hub_id, None, **options)


def _load(
    base_model: str,
    source: LocalSource | None,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    quantization: str,
    device: torch.device,
    local_files_only: bool = False,
) -> tuple[Any, PreTrainedModel]:
    """Tokenizer and model from ``source``, else from the hub (or, with ``local_files_only``, from its cache)."""
    where = base_model if source is None else source.directory
    common: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": trust_remote_code}
    for_tokenizer = common | (source.tokenizer_options() if source else {})
    for_model = common | (source.model_options() if source else {})
    if source and source.gguf_file:
        if quantization != QUANTIZATION:
            raise ConfigError(f"base_model {base_model!r} is a GGUF file, which is unpacked; set quantization to none")
    else:
        stored = _stored_quantization(where, common)
        for_model |= quantized.loading_options(base_model, quantization, stored, dtype, device)
    try:
        with _LOADING, quantized.quiet_about_merging():
            tokenizer = AutoTokenizer.from_pretrained(where, **for_tokenizer)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, output_loading_info=True, **for_model
            )
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
    return tokenizer, model


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


def _stored_quantization(where: str | Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """``quantization_config`` of a checkpoint's config.json, None without one; what is wrong there, the load says."""
    options = {name: value for name, value in options.items() if name != "trust_remote_code"}
    try:
        config, _ = PretrainedConfig.get_config_dict(where, **options)
    except (OSError, ValueError):
        return None
    found: dict[str, Any] | None = config.get("quantization_config")
    return found


def one_line(exc: BaseException) -> str:
    """The exception's type and text on one line, cut at 300 characters."""
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text[:300]}" if text else type(exc).__name__
