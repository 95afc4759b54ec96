"""A LocalBackend over a small random Qwen3 that reads and writes bytes, with one token per character."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tiny import perturb, save_byte_model
from transformers import PreTrainedTokenizerFast

from nat_plugin_evsys.backends.local import LocalBackend

END, USER, ASSISTANT = 256, 257, 258


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    special = ("<|end|>", "<|user|>", "<|assistant|>")
    return save_byte_model(tmp_path_factory.mktemp("models") / "tiny", special=special, vocab_size=259)


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
            perturb(made[-1]._model.adapter, seed=1, std=0.1)
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
