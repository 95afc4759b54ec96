"""Checkpoints: names, manifest, bit-exact resume, and every way of being torn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine import checkpoints
from nat_plugin_evsys.engine.checkpoint_loading import load_adapter, load_checkpoint
from nat_plugin_evsys.engine.checkpoints import list_checkpoints, save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.errors import CheckpointError

IDS = torch.tensor([[5, 17, 99, 3, 42, 150]])
ADAM = types.AdamParams(learning_rate=1e-2, weight_decay=0.01)


def logits(model: TrainableModel) -> Tensor:
    with torch.no_grad(), applied(model.adapter):
        return model.base.model(input_ids=IDS).logits


def weights(model: TrainableModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.parameters.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def train(model: TrainableModel, datums: Any, first: int, last: int) -> None:
    for step in range(first, last):
        model.forward_backward(datums(step), "cross_entropy")
        model.optim_step(ADAM)


def test_target_names_stay_exact_where_leaf_names_would_select_more(trainable: Any, tmp_path: Path) -> None:
    model = trainable("llama", train_mlp=False)
    config = json.loads((save_checkpoint(tmp_path, "a", model, kind="sampler") / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)


def test_resume_is_bit_exact(trainable: Any, make_ce_datums: Any, tmp_path: Path) -> None:
    straight = trainable("qwen3", seed=3)
    train(straight, make_ce_datums, 0, 6)

    first = trainable("qwen3", seed=3)
    train(first, make_ce_datums, 0, 3)
    path = save_checkpoint(tmp_path, "half", first, kind="training")

    resumed = trainable("qwen3", seed=99)
    assert load_checkpoint(path, resumed, with_optimizer=True).step == 3
    train(resumed, make_ce_datums, 3, 6)
    assert resumed.step == 6
    assert equal(weights(resumed), weights(straight))
    assert equal(resumed.optimizer.state_tensors(), straight.optimizer.state_tensors())

    weights_only = trainable("qwen3", seed=99)
    load_checkpoint(path, weights_only, with_optimizer=False)
    assert equal(weights(weights_only), weights(first))
    train(weights_only, make_ce_datums, 3, 6)
    assert not equal(weights(weights_only), weights(straight))


def test_load_adapter_of_any_rank(trainable: Any, tmp_path: Path) -> None:
    model = trainable("llama", perturbed=True, rank=3, alpha=5.0)
    path = save_checkpoint(tmp_path, "x", model, kind="sampler")
    adapter = load_adapter(path, model.base)
    with torch.no_grad(), applied(adapter):
        assert torch.equal(model.base.model(input_ids=IDS).logits, logits(model))


def test_manifest_and_listing(trainable: Any, make_ce_datums: Any, tmp_path: Path) -> None:
    model = trainable()
    assert list_checkpoints(tmp_path / "absent") == []
    save_checkpoint(tmp_path, "fresh", model, kind="training")  # an optimizer without moments yet
    load_checkpoint(tmp_path / "fresh", trainable(), with_optimizer=True)
    train(model, make_ce_datums, 0, 1)
    save_checkpoint(tmp_path, "one", model, kind="sampler", user_metadata={"reward": 0.5})
    assert [(i.path.name, i.kind, i.step, i.user_metadata) for i in list_checkpoints(tmp_path)] == [
        ("fresh", "training", 0, {}),
        ("one", "sampler", 1, {"reward": 0.5}),
    ]
    train(model, make_ce_datums, 1, 2)
    save_checkpoint(tmp_path, "one", model, kind="sampler")
    assert [i.step for i in list_checkpoints(tmp_path)] == [0, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "one"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/abs", ".hidden", "a\\b", "a\nb", "x" * 300, "ä"])
def test_names_cannot_leave_the_directory(name: str, trainable: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is refused"):
        save_checkpoint(tmp_path / "deep", name, trainable(), kind="sampler")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_metadata_that_is_no_json(value: object, trainable: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_checkpoint(tmp_path, "x", trainable(), kind="sampler", user_metadata={"x": value})
    assert list(tmp_path.iterdir()) == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


FILES = ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, lambda p: p.write_bytes(b"")])
def test_torn_checkpoints_are_refused_by_name(
    file: str, damage: Callable[[Path], Any], trainable: Any, make_ce_datums: Any, tmp_path: Path
) -> None:
    model = trainable()
    train(model, make_ce_datums, 0, 1)
    path = save_checkpoint(tmp_path, "good", model, kind="training")
    torn = shutil.copytree(path, tmp_path / "torn")
    damage(torn / file)
    victim = trainable(seed=5, perturbed=True)
    before = weights(victim)
    with pytest.raises(CheckpointError, match=f"torn is torn: {file}"):
        load_checkpoint(torn, victim, with_optimizer=True)
    assert equal(weights(victim), before)
    is_listed = damage is flip and file != "manifest.json"  # only reading the file tells
    assert [i.path.name for i in list_checkpoints(tmp_path)] == ["good", *["torn"] * is_listed]


def test_a_listing_reads_no_weights(trainable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, "one", trainable(), kind="training")
    opened: list[str] = []
    open_file = Path.open

    def noted(self: Path, *given: Any, **named: Any) -> Any:
        opened.append(self.name)
        return open_file(self, *given, **named)

    monkeypatch.setattr(Path, "open", noted)
    assert [info.path for info in list_checkpoints(tmp_path)] == [path]
    assert not [name for name in opened if name != "manifest.json"]
    checkpoints.read_checkpoint(path)
    assert {"adapter_model.safetensors", "optimizer.safetensors"} <= set(opened)


def test_weights_have_one_fingerprint_but_where_float16_rounds_them(
    trainable: Any, base_of: Any, tmp_path: Path
) -> None:
    saved = save_checkpoint(tmp_path, "x", trainable("llama"), kind="sampler")
    load_adapter(saved, base_of("llama", None, torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"weights_sha256.*load them in the dtype it was trained in"):
        load_adapter(saved, base_of("llama", None, torch.float16))


def test_mismatches_are_refused_by_name(trainable: Any, tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, "x", trainable("llama"), kind="sampler")
    cases: list[tuple[TrainableModel, bool, str]] = [
        (trainable("qwen3"), False, "another base model.*model_type llama / qwen3"),
        (trainable("llama", rank=8), False, "rank 4.*rank 8"),
        (trainable("llama", alpha=9.0), False, "alpha 8.*alpha 9"),
        (trainable("llama", train_mlp=False), False, "14 modules.*8 modules"),
        (trainable("llama"), True, "saved for sampling"),
    ]
    for model, with_optimizer, message in cases:
        before = weights(model)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved, model, with_optimizer=with_optimizer)
        assert equal(weights(model), before)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nope", trainable("llama"), with_optimizer=False)
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(saved, trainable("qwen3").base)
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(saved, trainable("llama"), with_optimizer=False)


def test_a_failing_save_keeps_the_previous_one(trainable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainable(perturbed=True)
    save_checkpoint(tmp_path, "x", model, kind="training")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, "x", model, kind="training")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "x", trainable(), with_optimizer=True).step == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_without_renameat2_a_kill_between_the_renames_is_repaired(
    trainable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nat_plugin_evsys.files._exchange", lambda new, target: False)
    model = trainable(perturbed=True)
    path = save_checkpoint(tmp_path, "x", model, kind="sampler")
    save_checkpoint(tmp_path, "x", model, kind="sampler")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    path.rename(tmp_path / ".x.old-0123")
    assert [i.path.name for i in list_checkpoints(tmp_path)] == ["x"]
