"""transformers' own Qwen3, small, with random weights."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 2048
CONTEXT_LENGTH = 4096
WEIGHT_STD = 0.05


def random_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Norms at one, every matrix drawn from a normal distribution, tensor by tensor in the order of their names.

    NumPy's generator draws the same numbers on every machine and thread count; torch's does not promise that.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=WEIGHT_STD,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                draw = rng.standard_normal(tuple(parameter.shape), dtype=np.float32) * np.float32(WEIGHT_STD)
                parameter.copy_(torch.from_numpy(draw))
    return model
