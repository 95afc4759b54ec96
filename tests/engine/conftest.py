"""Small random models of each family, saved to disk as a user would have them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tinker import types
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

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter

VOCAB = 200
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model_dir(family)``: a model directory with a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 1]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()

    def make(family: str) -> Path:
        path = root / family
        if not path.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(FAMILIES[family]()).save_pretrained(path)
            PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def base_of(model_dir: Callable[[str], Path]) -> Callable[[str], BaseModel]:
    """``base_of(family)``: one loaded base model per family, shared by all tests (it is frozen)."""
    loaded: dict[str, BaseModel] = {}

    def get(family: str) -> BaseModel:
        if family not in loaded:
            loaded[family] = load_base_model(str(model_dir(family)), device="cpu")
        return loaded[family]

    return get


def perturb(adapter: LoraAdapter, seed: int = 0, std: float = 0.05) -> LoraAdapter:
    """Move B away from zero, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(0, std, generator=generator)
    return adapter


@pytest.fixture
def trainable(base_of: Callable[[str], BaseModel]) -> Callable[..., TrainableModel]:
    """``trainable(family, seed=…, perturbed=…, **lora)``."""

    def make(
        family: str = "qwen3",
        *,
        seed: int = 0,
        perturbed: bool = False,
        token_budget: int | None = None,
        **lora: object,
    ) -> TrainableModel:
        base = base_of(family)
        shape = {"rank": 4, "alpha": 8.0, "train_unembed": False, **lora}
        adapter = LoraAdapter.create(base.model, seed=seed, **shape)  # type: ignore[arg-type]
        return TrainableModel(base, perturb(adapter, seed) if perturbed else adapter, token_budget=token_budget)

    return make


def ragged(seed: int, count: int = 5, shortest: int = 2, longest: int = 20) -> list[list[int]]:
    """Random token sequences of unequal lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def rl_datums(seed: int, **extra: Callable[[int, random.Random], list[float]]) -> list[types.Datum]:
    """Ragged Datums with a prompt of advantage 0 and signed advantages after it."""
    rng = random.Random(seed)
    data = []
    for tokens in ragged(seed, shortest=4):
        n = len(tokens) - 1
        prompt = rng.randint(0, n - 1)
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * prompt + [rng.uniform(-6.5, -4.0) for _ in range(n - prompt)],
            "advantages": [0.0] * prompt + [rng.uniform(-1.5, 1.5) for _ in range(n - prompt)],
            **{key: make(n, rng) for key, make in extra.items()},
        }
        data.append(types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs))
    return data


@pytest.fixture
def make_rl_datums() -> Callable[..., list[types.Datum]]:
    return rl_datums


@pytest.fixture
def make_ce_datums() -> Callable[..., list[types.Datum]]:
    """Ragged cross_entropy Datums with weights of any sign, some of them zero."""

    def make(seed: int, count: int = 5) -> list[types.Datum]:
        rng = random.Random(seed)
        data = []
        for tokens in ragged(seed, count):
            weights = [rng.choice([0.0, 1.0, rng.uniform(-1, 1)]) for _ in tokens[1:]]
            inputs = {"target_tokens": tokens[1:], "weights": weights}
            data.append(types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs))
        return data

    return make
