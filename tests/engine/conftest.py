"""Tiny base models, in memory and on disk, and trainable models over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from random_datums import ce_datums, related_datums, rl_datums
from tinker import types
from tiny import perturb, save_family, tiny_model
from tiny_vision import save_vision_model, vision_base

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model_dir(family)``: a model directory with a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        path = root / family
        return path if path.exists() else save_family(family, path)

    return make


@pytest.fixture(scope="session")
def base_of() -> Callable[..., BaseModel]:
    """``base_of(family, attention, dtype)``: one base model each, shared by all tests (it is frozen)."""
    built: dict[tuple[str, str | None, torch.dtype], BaseModel] = {}

    def get(family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> BaseModel:
        if (family, attention, dtype) not in built:
            model = tiny_model(family, attention=attention).to(dtype)
            built[family, attention, dtype] = wrap_model(family, model, None)
        return built[family, attention, dtype]

    return get


@pytest.fixture(scope="session")
def vision_base_of() -> Callable[[str], BaseModel]:
    """``vision_base_of(family)``: one base model each that reads images."""
    return cache(vision_base)


@pytest.fixture(scope="session")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``vision_dir(family)``: a model directory with a tokenizer and an image processor."""
    root = tmp_path_factory.mktemp("vision")
    return cache(lambda family: save_vision_model(family, root / family))


@pytest.fixture
def trainable(base_of: Callable[..., BaseModel]) -> Callable[..., TrainableModel]:
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
            adapter = perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0, seed=1, **lora), seed=2)
            models.append(TrainableModel(base, adapter, token_budget=token_budget, path=path))  # type: ignore[arg-type]
        return models[0], models[1]

    return make


@pytest.fixture
def make_rl_datums() -> Callable[..., list[types.Datum]]:
    """``make_rl_datums(seed, **extra)``."""
    return rl_datums


@pytest.fixture
def make_ce_datums() -> Callable[..., list[types.Datum]]:
    """``make_ce_datums(seed, count)``."""
    return ce_datums


@pytest.fixture
def make_datums() -> Callable[..., list[types.Datum]]:
    """``make_datums(seed, loss_fn, count, longest)``: sequences that share, repeat and extend each other."""
    return related_datums
