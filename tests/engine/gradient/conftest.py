"""Small random models, and families of Datums that share, repeat and extend each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from tinker import types
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter

VOCAB = 90
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
GEMMA = {**SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama3_rope": lambda: LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=8, sliding_window=16),
    "gemma2": lambda: Gemma2Config(**GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "gemma3_soft_cap": lambda: Gemma3TextConfig(**GEMMA, final_logit_softcapping=3.0),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "dynamic_rope": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_of() -> Callable[..., BaseModel]:
    """``base_of(family, attention, dtype)``: one base model each, shared by all tests (it is frozen)."""
    built: dict[tuple[str, str | None, torch.dtype], BaseModel] = {}

    def get(family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> BaseModel:
        if (family, attention, dtype) not in built:
            torch.manual_seed(0)
            options = {"attn_implementation": attention} if attention else {}
            model = AutoModelForCausalLM.from_config(CONFIGS[family](), **options)
            built[family, attention, dtype] = wrap_model(family, model.to(dtype), None)
        return built[family, attention, dtype]

    return get


@pytest.fixture(scope="session")
def pair(base_of: Callable[..., BaseModel]) -> Callable[..., tuple[TrainableModel, TrainableModel]]:
    """``pair(family, token_budget, **lora)``: the plain path and the default one, with equal adapters, B not zero."""

    def make(
        family: str = "qwen3",
        token_budget: int | None = None,
        attention: str | None = None,
        dtype: torch.dtype = torch.float32,
        **lora: bool,
    ) -> tuple[TrainableModel, TrainableModel]:
        base = base_of(family, attention, dtype)
        models = []
        for path in ("plain", "auto"):
            adapter = LoraAdapter.create(base.model, rank=4, alpha=8.0, seed=1, **lora)
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for _, b in adapter.weights.values():
                    b.normal_(0, 0.05, generator=generator)
            models.append(TrainableModel(base, adapter, token_budget=token_budget, path=path))  # type: ignore[arg-type]
        return models[0], models[1]

    return make


def family_of_sequences(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    """Up to ``longest`` tokens each: branches of branches, extensions, prefixes, duplicates, single tokens."""
    out = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]]
    while len(out) < count:
        base = rng.choice(out)
        kind = rng.choice(["branch", "branch", "extend", "prefix", "duplicate", "single", "stranger"])
        kept = {
            "branch": base[: rng.randint(0, len(base))],
            "extend": base,
            "prefix": base[: rng.randint(1, len(base))],
            "duplicate": base,
        }.get(kind, [])
        new = {"prefix": 0, "duplicate": 0, "single": 1}.get(kind, rng.randint(1, max(1, longest // 3)))
        out.append((kept + [rng.randrange(VOCAB) for _ in range(new)])[:longest])
    return out


@pytest.fixture
def make_datums() -> Callable[..., list[types.Datum]]:
    """``make_datums(seed, loss_fn, count, longest)``: Datums of which some share rows with different advantages."""

    def make(seed: int, loss_fn: str = "ppo", count: int = 7, longest: int = 24) -> list[types.Datum]:
        rng = random.Random(seed)
        data = []
        for tokens in family_of_sequences(rng, count, longest):
            n = len(tokens)
            targets = [*tokens[1:], rng.randrange(VOCAB)]
            masked = rng.randint(0, n - 1)
            trained = [i >= masked and rng.random() < 0.8 for i in range(n)]
            inputs: dict[str, list[float] | list[int]] = {"target_tokens": targets}
            if loss_fn == "cross_entropy":
                inputs["weights"] = [rng.uniform(-1, 1) if t else 0.0 for t in trained]
            else:
                inputs["logprobs"] = [rng.uniform(-5.5, -3.5) for _ in range(n)]
                inputs["advantages"] = [rng.uniform(-1.5, 1.5) if t else 0.0 for t in trained]
            if loss_fn == "gspo":
                inputs["sequence_ratio_mask"] = [1.0] * n
            data.append(types.Datum(types.ModelInput.from_ints(tokens), inputs))
        return data

    return make
