"""A whole decoder of the Llama shape through ``fused_layer``, where transformers' classes are known to be of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from nat_plugin_evsys.engine.model.lora import LoraAdapter, LoraLinear
from nat_plugin_evsys.engine.model.targets import text_decoder
from nat_plugin_evsys.engine.tree.fused_layer import FusedLayer, Rows, fused_layer
from nat_plugin_evsys.engine.tree.linear_stack import LinearStack
from nat_plugin_evsys.engine.tree.plan import TreePlan
from nat_plugin_evsys.engine.tree.trie import TokenTrie

_KNOWN = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class FusedDecoder:
    """The decoder.

    Attributes:
        decoder: transformers' module, for embedding, rotary embedding and last norm.
        layers: its layers.
    """

    decoder: Any
    layers: list[FusedLayer]

    @classmethod
    def of(cls, model: PreTrainedModel) -> FusedDecoder | None:
        """None where the model is of another shape, not fp32, or not on the CPU."""
        decoder: Any = text_decoder(model)
        if type(decoder) not in _KNOWN:
            return None
        if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in decoder.parameters()):
            return None
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        layers = [_layer(f"{prefix}.layers.{i}.", layer) for i, layer in enumerate(decoder.layers)]
        known = [layer for layer in layers if layer is not None]
        return cls(decoder, known) if len(known) == len(layers) else None

    def hidden(self, trie: TokenTrie, read: Tensor, adapter: LoraAdapter | None, *, keep: bool = True) -> Tensor:
        """Last hidden states of the rows ``read`` (R,), rising, of the trie: [R, H].

        ``keep=False`` keeps each layer's input alone for the backward pass, which then takes a forward pass longer.
        """
        x = self.decoder.embed_tokens(torch.from_numpy(trie.tokens))
        cos, sin = self.decoder.rotary_emb(x[None], torch.from_numpy(trie.depths)[None])
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        rows = Rows(cos, sin, TreePlan.build(trie, x.device))
        last = Rows(cos, sin, TreePlan.build(trie, x.device, read.numpy()), read) if len(read) < len(trie) else rows
        for i, layer in enumerate(self.layers):
            pairs = [None if adapter is None else adapter.weights.get(name) for name in layer.names]
            here = last if i == len(self.layers) - 1 else rows
            x = fused_layer(x, layer, here, pairs, 1.0 if adapter is None else adapter.scale, keep=keep)
        out: Tensor = self.decoder.norm(x)
        return out


def _layer(prefix: str, layer: Any) -> FusedLayer | None:
    """None where a module is not what the class's name promises."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [layer.get_submodule(name) for name in _LINEARS]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    eps = {n.variance_epsilon for n in (*norms, *head_norms) if n is not None}
    if any(type(linear) is not LoraLinear for linear in linears) or len(eps) != 1 or not _is_silu(mlp.act_fn):
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules()):
        return None
    q, k, v, o, gate, up, down = linears
    return FusedLayer(
        query=LinearStack([q], norms[0].weight),
        key_value=LinearStack([k, v], norms[0].weight),
        output=LinearStack([o]),
        gate_up=LinearStack([gate, up], norms[1].weight),
        down=LinearStack([down]),
        query_norm=None if head_norms[0] is None else head_norms[0].weight,
        key_norm=None if head_norms[1] is None else head_norms[1].weight,
        names=[prefix + name for name in _LINEARS],
        heads=q.out_features // attention.head_dim,
        kv_heads=k.out_features // attention.head_dim,
        dim=attention.head_dim,
        scale=attention.scaling,
        eps=eps.pop(),
    )


def _is_silu(module: nn.Module) -> bool:
    x = torch.linspace(-4, 4, 9)
    return bool(torch.allclose(module(x), nn.functional.silu(x)))
