"""A ServiceClient over a small random Qwen3 model with a byte-level tokenizer (one token a byte)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import make_model

from nat_plugin_evsys import ServiceClient, TrainingClient, types


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models") / "tiny", 0))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the same shape, with other weights."""
    return str(make_model(tmp_path_factory.mktemp("models") / "other", 1))


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


def make_datums(seed: int, count: int = 3, length: int = 10) -> list[types.Datum]:
    """Random cross_entropy Datums."""
    rng = random.Random(seed)
    rows = [[rng.randrange(256) for _ in range(length)] for _ in range(count)]
    return [types.Datum(types.ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in rows]


@pytest.fixture
def datums() -> Callable[..., list[types.Datum]]:
    """``datums(seed, count, length)``."""
    return make_datums


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
