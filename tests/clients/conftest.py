"""A ServiceClient over a small random Qwen3 model with a byte-level tokenizer (one token a byte)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from random_datums import byte_datums
from tiny import save_byte_model

from nat_plugin_evsys import ServiceClient, TrainingClient, types


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_byte_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the same shape, with other weights."""
    return str(save_byte_model(tmp_path_factory.mktemp("models") / "other", seed=1))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def service(store: Path) -> Iterator[ServiceClient]:
    with ServiceClient(store=store, device="cpu") as client:
        yield client


@pytest.fixture
def make_client(service: ServiceClient, tiny_model: str) -> Callable[..., TrainingClient]:
    """``make_client(**options)``: a training client of rank 4 and seed 0."""

    def make(**options: Any) -> TrainingClient:
        return service.create_lora_training_client(tiny_model, **{"rank": 4, "seed": 0, **options}).result()

    return make


@pytest.fixture
def client(make_client: Callable[..., TrainingClient]) -> TrainingClient:
    return make_client()


@pytest.fixture
def datums() -> Callable[..., list[types.Datum]]:
    """``datums(seed, count, length)``."""
    return byte_datums


@pytest.fixture
def train(datums: Callable[..., list[types.Datum]]) -> Callable[[TrainingClient, int, int], list[float]]:
    """``train(client, first, last)``: steps on the same three Datums; the losses."""

    def run(client: TrainingClient, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            output = client.forward_backward(datums(0), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-2 / (1 + step), grad_clip_norm=10.0)).result()
            losses.append(output.result().loss)
        return losses

    return run


@pytest.fixture
def probe(datums: Callable[..., list[types.Datum]]) -> Callable[[TrainingClient], list[float]]:
    """``probe(client)``: logprobs that tell its weights exactly."""

    def run(client: TrainingClient) -> list[float]:
        output = client.forward(datums(99), "cross_entropy").result()
        return [value for out in output.loss_fn_outputs for value in out["logprobs"].data]

    return run
