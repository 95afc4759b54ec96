"""The model of the benchmarks: random weights in transformers' classes, the same LoRA in the engine and in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from workloads import Shape

if TYPE_CHECKING:
    from nat_plugin_evsys.engine.model.loading import BaseModel
    from nat_plugin_evsys.engine.model.lora import LoraAdapter

RANK, ALPHA = 16, 32.0


def build_model(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """A causal language model of ``shape``.

    Args:
        weights: ``tensors_of`` such a model, on any device and in any precision; None draws them, which gives other
            weights on another device.
    """
    import transformers

    torch.manual_seed(0)
    kind = {
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
        "gemma3": transformers.Gemma3TextConfig,
    }[shape.family]
    config = kind(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.family != "llama",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        # As with the others; a scale of its own would have a GPU compile its attention once more.
        **({"query_pre_attn_scalar": shape.head_dim} if shape.family == "gemma3" else {}),
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    if weights is not None:
        with torch.no_grad():
            for name, tensor in tensors_of(model).items():
                tensor.copy_(weights[name])
    return model


def tensors_of(model: Any) -> dict[str, Tensor]:
    """All that a model computes with: the rotary frequencies too, which another device rounds differently."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def engine_model(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[BaseModel, LoraAdapter]:
    """``build_model`` as the engine holds it, and the adapter."""
    from nat_plugin_evsys.engine.model.loading import wrap_model
    from nat_plugin_evsys.engine.model.lora import LoraAdapter

    base = wrap_model("bench", build_model(shape, device, dtype, weights), None)
    adapter = LoraAdapter.create(base.model, rank=RANK, alpha=ALPHA)
    _set_weights(dict(adapter.named_tensors()))
    return base, adapter


def peft_model(
    shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """``build_model`` with PEFT's adapter, and what of it is trained, under the engine's names."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0)
    model: Any = get_peft_model(build_model(shape, device, dtype), config)
    named = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    _set_weights(named)
    return model, named


@torch.no_grad()
def _set_weights(named: Mapping[str, Tensor]) -> None:
    """The same A and B everywhere; B is not zero, or A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    for _, tensor in sorted(named.items()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.03)
