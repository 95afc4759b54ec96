"""Small random models of each family, wrapped as the engine loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.sampler import Sampler

VOCAB = 300
WINDOW = 8
CONTEXT = 96

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=CONTEXT,
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_MIXED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])

FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_COMMON)),
    "qwen3-window": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_COMMON, use_sliding_window=True, **_MIXED)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_COMMON, tie_word_embeddings=True)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_COMMON)),
    "mistral-window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_COMMON, sliding_window=WINDOW)
    ),
    "gemma2-window": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_COMMON, query_pre_attn_scalar=12, **_MIXED)
    ),
    "gemma3-window": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_COMMON, query_pre_attn_scalar=12, **_MIXED)
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**_COMMON, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2)
    ),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of VOCAB tokens whose EOS is ``<|im_end|>`` (id 0)."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox stops at the lazy dog and the stop sign. "] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def make_base(tokenizer: Any) -> Callable[[str], BaseModel]:
    """``make_base(family)``: the family's model with random weights, fp32, built once."""
    built: dict[str, BaseModel] = {}

    def make(family: str) -> BaseModel:
        if family not in built:
            torch.manual_seed(7)
            built[family] = wrap_model(family, FAMILIES[family](), tokenizer)
        return built[family]

    return make


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., LoraAdapter]:
    """``make_adapter(base, seed)``: a snapshot whose B is far from zero."""

    def make(base: BaseModel, seed: int = 0) -> LoraAdapter:
        adapter = LoraAdapter.create(base.model, rank=4, alpha=8, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, b in adapter.weights.values():
                b.normal_(std=0.1, generator=generator)
        return adapter.snapshot()

    return make


@pytest.fixture(scope="session")
def plain_logits() -> Callable[..., torch.Tensor]:
    """``plain_logits(base, adapter, ids)``: (len(ids), V) of one forward pass: no cache, no batch, no own mask."""

    def logits(base: BaseModel, adapter: LoraAdapter | None, ids: list[int]) -> torch.Tensor:
        with torch.no_grad(), applied(adapter):
            return base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    return logits


@pytest.fixture(scope="session")
def base(make_base: Callable[[str], BaseModel]) -> BaseModel:
    """The Qwen3 model, for tests that need just one family."""
    return make_base("qwen3")


@pytest.fixture(scope="session")
def adapter(base: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> LoraAdapter:
    """A perturbed adapter of ``base``."""
    return make_adapter(base)


@pytest.fixture
def make_sampler() -> Iterator[Callable[..., Sampler]]:
    """``make_sampler(base, **options)``: a sampler that is closed when the test ends."""
    made: list[Sampler] = []

    def make(base: BaseModel, **options: Any) -> Sampler:
        made.append(Sampler(base, **options))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()
