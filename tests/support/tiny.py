"""The tiny random models of the tests: one of each family, through transformers' own classes, in memory or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from nat_plugin_evsys.engine.model.lora import LoraAdapter

VOCAB = 200
CONTEXT = 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Shorter than most sequences of the tests, so that the window matters.
WINDOW = 16
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {"query_pre_attn_scalar": 8, **_MIXED}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 64,
    "no_rope_layers": [1, 0],
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3_window": (transformers.Qwen3Config, {"use_sliding_window": True, **_MIXED}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, _EXPERTS),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "llama": (transformers.LlamaConfig, {}),
    "llama3_rope": (transformers.LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "dynamic_rope": (transformers.LlamaConfig, {"rope_parameters": _DYNAMIC_ROPE}),
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW}),
    "llama4": (transformers.Llama4TextConfig, _LLAMA4),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": (transformers.Gemma2Config, _GEMMA),
    "gemma3": (transformers.Gemma3TextConfig, _GEMMA),
    "gemma3_soft_cap": (transformers.Gemma3TextConfig, {"final_logit_softcapping": 3.0, **_GEMMA}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 3.0}),
}
PROVED = {
    "qwen3": "Qwen3",
    "qwen2": "Qwen2.5",
    "llama": "Llama",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
}
"""The families that every promise of the engine is held to, by their names in reports; the others are for one trait."""

END = "<|im_end|>"
BYTES = 256
"""Token ids below it are one a byte, in the order of the byte-level alphabet; special tokens follow."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The family's configuration, with ``changes`` to ``SHAPE``."""
    kind, traits = FAMILIES[family]
    return kind(**{**SHAPE, **traits, **changes})


def tiny_model(family: str, *, seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """A float32 model with weights of this seed.

    Args:
        attention: transformers' name of an attention implementation.
        changes: to the family's configuration.
    """
    options = {"attn_implementation": attention} if attention else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), **options)
    assert isinstance(model, PreTrainedModel)
    return model


def byte_tokenizer(*special: str, letters: int = BYTES) -> PreTrainedTokenizerFast:
    """One token a byte, then the special ones, of which the first ends a turn.

    Args:
        letters: how many of the 256 bytes it knows.
    """
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:letters], *special]
    raw = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names: dict[str, Any] = {"eos_token": special[0], "additional_special_tokens": [*special[1:]]} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def save_family(family: str, path: Path) -> Path:
    """Write the family's model of ``VOCAB`` tokens and a tokenizer to ``path``, as a user would have them."""
    tiny_model(family).save_pretrained(path)
    byte_tokenizer(letters=VOCAB - 1).save_pretrained(path)
    return path


def save_byte_model(path: Path, seed: int = 0, special: Sequence[str] = (END,), **changes: Any) -> Path:
    """Write a Qwen3 of 260 tokens that reads and writes any text, with weights of this seed, to ``path``.

    Args:
        special: tokens 256, 257, …; the first one ends a turn.
        changes: to the configuration.
    """
    own = {"vocab_size": 260, "intermediate_size": 64, "initializer_range": 0.2, "eos_token_id": BYTES}
    tiny_model("qwen3", seed=seed, **{**own, **changes}).save_pretrained(path)
    byte_tokenizer(*special).save_pretrained(path)
    return path


def perturb(adapter: LoraAdapter, seed: int = 0, std: float = 0.05) -> LoraAdapter:
    """Move B away from zero in place, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(0, std, generator=generator)
    return adapter
