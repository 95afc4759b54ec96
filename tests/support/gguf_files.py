"""Hugging Face directories rewritten as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from safetensors.torch import load_file


def write_gguf(source: Path, target: Path) -> Path:
    """Write a Qwen2 model of ``source`` (with a tokenizer of single bytes) to ``target``, in float32."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokenizer = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    merge = tokens[:2]  # the format knows no tokenizer without merges
    tokens += ["".join(merge), *(f"[unused{n}]" for n in range(len(tokens) + 1, config["vocab_size"]))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(merge)])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        name_there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert name_there is not None
        writer.add_tensor(name_there, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
