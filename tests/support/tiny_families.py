"""One tiny, randomly initialised model of each family, through transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nat_plugin_evsys.engine.model.lora import LoraAdapter

VOCAB = 200
CONTEXT = 160
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Shorter than the sequences of the tests, so that the window matters.
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOW}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8, tie_word_embeddings=True),
    "Qwen2.5": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=False),
    "Llama": lambda: LlamaConfig(**_SHAPE),
    "Gemma 2": lambda: Gemma2Config(**_SHAPE, **_GEMMA),
    "Gemma 3": lambda: Gemma3TextConfig(**_SHAPE, **_GEMMA),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(
        **_SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "Mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4),
}


def save_family(family: str, path: Path) -> Path:
    """Write the family's model and a byte-level tokenizer to ``path``, as a user would have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 1]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]()).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def perturb(adapter: LoraAdapter, seed: int = 0, std: float = 0.05) -> LoraAdapter:
    """Move B away from zero in place, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(0, std, generator=generator)
    return adapter
