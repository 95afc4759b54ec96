"""An adapter that PEFT wrote is a start: it computes the same here, and what cannot be computed is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_model

from nat_plugin_evsys.engine.checkpoint_loading import load_adapter, start_from
from nat_plugin_evsys.engine.checkpoints import read_checkpoint, save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.errors import CheckpointError

IDS = torch.tensor([[5, 17, 99, 3, 42, 150]])


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return wrap_model("tiny", tiny_model("llama", seed=3), None)


@pytest.fixture
def written(base: BaseModel, tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """``written(**config)``: a directory that PEFT wrote, and the logits that PEFT computes with it."""

    def write(**config: Any) -> tuple[Path, torch.Tensor]:
        options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(tiny_model("llama", seed=3)), peft.LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(str(tmp_path / "foreign"), save_embedding_layers=False)
        with torch.no_grad():
            return tmp_path / "foreign", model.eval()(input_ids=IDS).logits

    return write


def logits(base: BaseModel, adapter: LoraAdapter) -> torch.Tensor:
    with torch.no_grad(), applied(adapter):
        return base.model(input_ids=IDS).logits


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"r": 8, "target_modules": "all-linear"}])
def test_it_computes_the_same(base: BaseModel, written: Callable[..., Any], config: dict[str, Any]) -> None:
    directory, expected = written(**config)
    torch.testing.assert_close(logits(base, load_adapter(directory, base)), expected, rtol=0, atol=1e-5)


def test_training_starts_from_it_also_at_a_higher_rank(
    base: BaseModel, written: Callable[..., Any], tmp_path: Path
) -> None:
    directory, expected = written()
    model = TrainableModel(base, LoraAdapter.create(base.model, rank=8, alpha=32, seed=1))
    for _, b in model.adapter.weights.values():
        b.data.normal_()
    info = start_from(directory, model)
    assert (info.is_foreign, info.rank, model.step) == (True, 4, 0)
    torch.testing.assert_close(logits(base, model.adapter), expected, rtol=0, atol=1e-5)
    assert all(a[4:].abs().sum() > 0 for a, _ in model.adapter.weights.values())  # what is more can learn

    own = save_checkpoint(tmp_path, "own", model, kind="sampler")
    larger = TrainableModel(base, LoraAdapter.create(base.model, rank=12, alpha=8, seed=2))
    start_from(own, larger)
    torch.testing.assert_close(logits(base, larger.adapter), expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"has LoRA rank 8 .* this model has rank 4"):
        start_from(own, TrainableModel(base, LoraAdapter.create(base.model, rank=4, alpha=8)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks that differ"),
        ({"bias": "lora_only"}, "biases"),
        ({"target_modules": ["embed_tokens"]}, "no LoRA matrix of a linear layer"),
    ],
)
def test_another_formula_is_refused_by_name(written: Callable[..., Any], config: dict[str, Any], named: str) -> None:
    directory, _ = written(**config)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(directory)


def test_one_of_another_model_is_refused(written: Callable[..., Any]) -> None:
    directory, _ = written()
    wider = wrap_model("wider", tiny_model("llama", seed=3, hidden_size=48), None)
    with pytest.raises(CheckpointError, match=r"has shape .* but wider needs"):
        load_adapter(directory, wider)


def test_a_checkpoint_that_lost_its_manifest_is_not_taken_for_one(base: BaseModel, tmp_path: Path) -> None:
    model = TrainableModel(base, LoraAdapter.create(base.model, rank=4, alpha=8))
    own = save_checkpoint(tmp_path, "own", model, kind="training")
    (own / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"is torn: manifest\.json is missing"):
        read_checkpoint(own)


def test_a_file_that_cannot_be_read_is_named(written: Callable[..., Any]) -> None:
    directory, _ = written()
    config = directory / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": None}))
    with pytest.raises(CheckpointError, match="no usable r and lora_alpha"):
        read_checkpoint(directory)
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        read_checkpoint(directory)
