"""A trained adapter for other programs: merged into its base model, or alone; checked by loading it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nat_plugin_evsys.engine.model.forward import share_of_norm
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.model.peft_check import load_in_peft, trains_tied_head, write_adapter
from nat_plugin_evsys.engine.model.plain_copy import plain_copy
from nat_plugin_evsys.engine.model.quantized import unpack
from nat_plugin_evsys.engine.model.vision import Vision, auto_class
from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.files import atomic_directory

_TOKENS = 16
_FP32, _HALF = 1e-3, 0.1
"""Allowed distance of logits, as a share of their norm. Merging rounds a weight once more in a dtype of few bits."""


def export_merged(base: BaseModel, adapter: LoraAdapter, target: Path) -> float:
    """Write model and tokenizer (and image processor) to the new directory ``target``, with the adapter in the weights.

    An output head that shares the embedding's weight gets one of its own if it was trained.

    Returns:
        Distance of the written model's logits from the engine's, as a share of their norm.

    Raises:
        CheckpointError: ``target`` exists, cannot be written, or computes something else when loaded back.
    """
    with _new_directory(target) as work:
        merged(base, adapter).save_pretrained(work)
        base.tokenizer.save_pretrained(work)
        if isinstance(base.vision, Vision):
            base.vision.processor.save_pretrained(work)
        loaded: Any = auto_class(base.model.config.model_type).from_pretrained(work, dtype=base.dtype)
        return _checked(base, adapter, loaded.to(base.device).eval(), "the merged model")


def export_adapter(base: BaseModel, adapter: LoraAdapter, target: Path) -> float:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to the new directory ``target``.

    Returns and raises what ``export_merged`` does; PEFT, which must be installed, loads it back.
    """
    with _new_directory(target) as work:
        write_adapter(work, base, adapter)
        try:
            loaded = load_in_peft(base.model, work)
        except ImportError as exc:
            raise CheckpointError("the adapter cannot be checked without PEFT: pip install peft") from exc
        return _checked(base, adapter, loaded, "the adapter in PEFT")


def merged(base: BaseModel, adapter: LoraAdapter) -> PreTrainedModel:
    """transformers' model with ``W + scale * B A`` for each adapted weight; the others are those of ``base``.

    Packed layers are unpacked, whether they are adapted or not.
    """
    model = plain_copy(base.model)
    unpack(model, base.dtype)
    if trains_tied_head(base, adapter):
        _untie(model)
    with torch.no_grad():
        for name, (a, b) in adapter.weights.items():
            module: Any = model.get_submodule(name)
            delta = adapter.scale * (b.float() @ a.float())
            weight = module.weight.float() + (delta.T if isinstance(module, Conv1D) else delta)
            module.weight = nn.Parameter(weight.to(base.dtype).contiguous(), requires_grad=False)
    return model


def _untie(model: Any) -> None:
    """Let the output head keep a weight of its own, also when it is saved and loaded."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _new_directory(target: Path) -> Any:
    if target.exists():
        raise CheckpointError(f"{target} exists already; give another --output, or remove it")
    return atomic_directory(target)


def _checked(base: BaseModel, adapter: LoraAdapter, loaded: Any, what: str) -> float:
    ids = (torch.arange(_TOKENS, device=base.device) * 13 % base.vocab_size)[None]
    with torch.no_grad():
        with applied(adapter):
            expected: Tensor = base.model(input_ids=ids, use_cache=False).logits.float()
        with applied(None):
            found: Tensor = loaded(input_ids=ids, use_cache=False).logits.float()
    gap = share_of_norm(found, expected)
    if not gap <= (_FP32 if base.dtype == torch.float32 else _HALF):
        raise CheckpointError(
            f"{what} computes something else than the engine when it is loaded back: its logits are off by {gap:.1e} "
            "of their norm; nothing was written"
        )
    return gap
