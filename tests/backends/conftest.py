"""A LocalBackend over a small random Qwen3 model on disk."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tinker import types
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from nat_plugin_evsys.backends.local import LocalBackend


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<|im_end|>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = Qwen3Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(path)
    return path


@pytest_asyncio.fixture
async def make_backend(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """``await make_backend(**options of LocalBackend.create)``; all are closed at the end."""
    made: list[LocalBackend] = []

    async def make(**options: Any) -> LocalBackend:
        options = {"checkpoint_dir": tmp_path / "checkpoints", "rank": 4, "device": "cpu", **options}
        made.append(await LocalBackend.create(str(tiny_model), **options))
        return made[-1]

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture
def make_datums() -> Callable[..., list[types.Datum]]:
    """``make_datums(seed, count, length)`` of cross_entropy Datums."""

    def make(seed: int, count: int = 4, length: int = 12) -> list[types.Datum]:
        rng = random.Random(seed)
        rows = [[rng.randrange(256) for _ in range(length)] for _ in range(count)]
        return [types.Datum(types.ModelInput.from_ints(r[:-1]), {"target_tokens": r[1:]}) for r in rows]

    return make
