"""Loading the frozen base model and its tokenizer."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from nat_plugin_evsys.engine.model import long_rope, lora, quantized, tensor_parallel
from nat_plugin_evsys.engine.model.builtin import PREFIX, builtin_tokenizer
from nat_plugin_evsys.engine.model.identity import model_identity
from nat_plugin_evsys.engine.model.images import NoImages
from nat_plugin_evsys.engine.model.source import find_local
from nat_plugin_evsys.engine.model.stored_model import LOADING, load_from_hub, load_stored
from nat_plugin_evsys.engine.model.vision import Vision, find_vision
from nat_plugin_evsys.errors import ConfigError, ModelError, one_line
from nat_plugin_evsys.runtime.defaults import QUANTIZATION

logger = logging.getLogger(__name__)

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
        vision: reads images, or says why the model reads text only.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    context_length: int
    vocab_size: int
    identity: dict[str, Any]
    vision: Vision | NoImages


def load_base_model(
    base_model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context_length: int | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
    quantization: str = QUANTIZATION,
    parts: int = 1,
) -> BaseModel:
    """Load ``builtin/<name>``, a local directory, a GGUF file (or the one in a directory) or a Hugging Face hub id.

    ``device="auto"`` is CUDA when present, else the CPU. ``dtype="auto"`` is bfloat16 on a GPU that has it and float32
    elsewhere. A hub model that is already in the Hugging Face cache is loaded from there without any network access.
    ``quantization``: ``none``, or one of ``quantized.PACKED``, which packs the linear layers. ``parts``: processes
    of the present torch process group, each of which loads its part of the model (``tensor_parallel``).

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
        "parts": parts,
    }
    source = find_local(base_model, cache_dir or default_cache_dir())
    loaded = load_stored(base_model, source, **options) if source is not None else load_from_hub(base_model, **options)
    loaded.model.to(where)  # type: ignore[arg-type]  # transformers wraps .to() without its overloads
    base = wrap_model(
        base_model,
        loaded.model,
        loaded.tokenizer,
        context_length=context_length,
        image_processor=loaded.image_processor,
    )
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
        with LOADING:
            if source is None:
                return AutoTokenizer.from_pretrained(base_model)
            return AutoTokenizer.from_pretrained(source.directory, **source.tokenizer_options())
    except Exception as exc:
        # Boundary: transformers and the hub client raise many types; all become one readable line.
        raise ModelError(f"the tokenizer of {base_model!r} cannot be loaded: {one_line(exc)}") from exc


def wrap_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    context_length: int | None = None,
    image_processor: Any = None,
) -> BaseModel:
    """A ``BaseModel`` around a loaded transformers model: frozen, in eval mode, LoRA hooks installed.

    ``image_processor``: transformers', of a model that reads images.

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
    tensor_parallel.install(model)
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
        vision=find_vision(model, image_processor),
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
