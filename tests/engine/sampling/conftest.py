"""Tiny models with a tokenizer whose words span bytes, and samplers over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from constructed import reciting
from tiny import END, perturb, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.sampler import Sampler

VOCAB = 300
CONTEXT = 96


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of VOCAB tokens whose EOS is ``<|im_end|>`` (id 0)."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox stops at the lazy dog and the stop sign. "] * 20, trainer)
    raw.add_tokens([f"[word {number}]" for number in range(VOCAB - raw.get_vocab_size())])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END)


@pytest.fixture(scope="session")
def make_base(tokenizer: Any) -> Callable[[str], BaseModel]:
    """``make_base(family)``: the family's model with random weights, fp32, built once."""
    built: dict[str, BaseModel] = {}

    def make(family: str) -> BaseModel:
        if family not in built:
            model = tiny_model(family, seed=7, vocab_size=VOCAB, max_position_embeddings=CONTEXT)
            built[family] = wrap_model(family, model, tokenizer)
        return built[family]

    return make


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., LoraAdapter]:
    """``make_adapter(base, seed)``: a snapshot whose B is far from zero."""

    def make(base: BaseModel, seed: int = 0) -> LoraAdapter:
        return perturb(LoraAdapter.create(base.model, rank=4, alpha=8, seed=seed), seed, std=0.1).snapshot()

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


@pytest.fixture(scope="session")
def make_reciting(tokenizer: Any) -> Callable[[list[int]], BaseModel]:
    """``make_reciting(tokens)``: a base model that says these tokens one after the other, round and round."""

    def make(tokens: list[int]) -> BaseModel:
        shape = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "hidden_size": 64, "head_dim": 16}
        model = tiny_model("qwen3", tie_word_embeddings=False, **shape)
        return wrap_model("reciting", reciting(model, tokens), tokenizer)

    return make


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
