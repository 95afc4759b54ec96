"""A LocalBackend over a small random Qwen3 that reads and writes bytes, with one token per character."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from nat_plugin_evsys.backends.local import LocalBackend

END, USER, ASSISTANT = 256, 257, 258


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = [*sorted(alphabet), "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.save_pretrained(path)
    return path


@pytest_asyncio.fixture
async def make_backend(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """``await make_backend(perturbed=False, **options of LocalBackend.create)``; all are closed at the end.

    ``perturbed`` moves B away from zero, so that the adapter matters from the start.
    """
    made: list[LocalBackend] = []

    async def make(*, perturbed: bool = False, **options: Any) -> LocalBackend:
        options = {"checkpoint_dir": tmp_path / "checkpoints", "rank": 4, "device": "cpu", **options}
        made.append(await LocalBackend.create(str(tiny_model), **options))
        if perturbed:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, b in made[-1]._model.adapter.weights.values():
                    b.normal_(0, 0.1, generator=generator)
        return made[-1]

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture(scope="session")
def render(tiny_model: Path) -> Callable[..., list[int]]:
    """``render(messages, tools)``: ids that end with the opening of an assistant turn."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)

    def to_ids(messages: Any, tools: Any = ()) -> list[int]:
        ids: list[int] = []
        for message in messages:
            role = ASSISTANT if message["role"] == "assistant" else USER
            ids += [role, *tokenizer(message["content"])["input_ids"], END]
        return [*ids, ASSISTANT]

    return to_ids


@pytest.fixture(scope="session")
def render_reply(tiny_model: Path) -> Callable[..., list[int]]:
    """``render_reply(message)``: the reply's ids with its end token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    return lambda message: [*tokenizer(message["content"])["input_ids"], END]


@pytest.fixture(scope="session")
def full_logprobs() -> Callable[..., torch.Tensor]:
    """``full_logprobs(backend, ids) -> (N, V)``: log-softmax over the vocabulary of the model's own forward pass.

    Carries the gradient to the adapter. No padding, no chunks, no gather: the plain computation.
    """
    from nat_plugin_evsys.engine.model.lora import applied

    def compute(backend: LocalBackend, ids: list[int]) -> torch.Tensor:
        with applied(backend._model.adapter):
            logits = backend.base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits.double().log_softmax(dim=-1)

    return compute


@pytest.fixture(scope="session")
def gradient_error() -> Callable[..., float]:
    """``gradient_error(backend, loss)``: relative L2 distance of the accumulated gradient to autograd's of ``loss``."""

    def compare(backend: LocalBackend, loss: torch.Tensor) -> float:
        parameters = backend._model.parameters
        expected = torch.autograd.grad(loss, list(parameters.values()))
        found = backend._model.gradient
        assert found is not None
        difference = torch.cat([(found[n] - g).double().flatten() for n, g in zip(parameters, expected, strict=True)])
        norm = torch.cat([g.double().flatten() for g in expected]).norm()
        assert norm > 0
        return float(difference.norm() / norm)

    return compare
