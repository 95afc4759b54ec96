"""Checkpoints: PEFT round trip, bit-exact resume, and every way of being torn."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tinker import types
from torch import Tensor
from transformers import AutoModelForCausalLM

from nat_plugin_evsys.engine import checkpoints
from nat_plugin_evsys.engine.checkpoints import list_checkpoints, load_adapter, load_checkpoint, save_checkpoint
from nat_plugin_evsys.engine.lora import applied
from nat_plugin_evsys.engine.training import TrainableModel
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


@pytest.mark.parametrize("unembed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gemma2", "gemma3", "qwen3_moe", "mixtral"])
def test_peft_loads_and_merges_to_the_same_logits(
    family: str, unembed: bool, trainable: Any, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model = trainable(family, perturbed=True, train_unembed=unembed)
    path = save_checkpoint(tmp_path, "best", model, kind="sampler")
    plain = AutoModelForCausalLM.from_pretrained(model_dir(family))
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    peft_model = PeftModel.from_pretrained(plain, path)
    loaded = {n for n, _ in peft_model.named_parameters() if "lora_" in n}
    assert len(loaded) == 2 * len(model.adapter.weights)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(input_ids=IDS).logits, logits(model), rtol=1e-5, atol=1e-5)
        if unembed and tied:
            return  # merging would write into the shared embedding
        merged = peft_model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits(model), rtol=1e-4, atol=1e-4)


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


RESUME_SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from tinker import types
from nat_plugin_evsys.engine.checkpoints import load_checkpoint, save_checkpoint
from nat_plugin_evsys.engine.lora import LoraAdapter
from nat_plugin_evsys.engine.model import load_base_model
from nat_plugin_evsys.engine.training import TrainableModel
from pathlib import Path
base = load_base_model(sys.argv[1], device="cpu")
model = TrainableModel(base, LoraAdapter.create(base.model, rank=4, alpha=8.0, seed=5))
load_checkpoint(sys.argv[2], model, with_optimizer=True)
for step in range(3, 6):
    tokens = [(7 * step + 3 * i) % 200 for i in range(12)]
    model.forward_backward(
        [types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})], "cross_entropy"
    )
    model.optim_step(types.AdamParams(learning_rate=1e-2, weight_decay=0.01))
save_checkpoint(Path(sys.argv[3]), "end", model, kind="training")
"""


def test_resume_in_a_new_process_is_bit_exact(trainable: Any, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    def datums(step: int) -> list[types.Datum]:
        tokens = [(7 * step + 3 * i) % 200 for i in range(12)]
        return [types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})]

    model = trainable("qwen3", seed=3)
    train(model, datums, 0, 3)
    half = save_checkpoint(tmp_path, "half", model, kind="training")
    train(model, datums, 3, 6)
    command = [sys.executable, "-c", RESUME_SCRIPT, str(model_dir("qwen3")), str(half), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    other = trainable("qwen3", seed=8)
    load_checkpoint(tmp_path / "end", other, with_optimizer=True)
    assert equal(weights(other), weights(model))
    assert equal(other.optimizer.state_tensors(), model.optimizer.state_tensors())


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


def test_metadata_that_is_no_json(trainable: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_checkpoint(tmp_path, "x", trainable(), kind="sampler", user_metadata={"x": object()})
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
    assert [i.path.name for i in list_checkpoints(tmp_path)] == ["good"]


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
    monkeypatch.setattr("nat_plugin_evsys.engine.atomic._exchange", lambda new, target: False)
    model = trainable(perturbed=True)
    path = save_checkpoint(tmp_path, "x", model, kind="sampler")
    save_checkpoint(tmp_path, "x", model, kind="sampler")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    path.rename(tmp_path / ".x.old-0123")
    assert [i.path.name for i in list_checkpoints(tmp_path)] == ["x"]


KILL_SAVES = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from nat_plugin_evsys.engine.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from nat_plugin_evsys.engine.lora import LoraAdapter
from nat_plugin_evsys.engine.model import load_base_model
from nat_plugin_evsys.engine.training import TrainableModel
base = load_base_model(sys.argv[1], device="cpu")
directory = Path(sys.argv[2])
model, probe = (TrainableModel(base, LoraAdapter.create(base.model, rank=4, alpha=8.0)) for _ in range(2))
save_checkpoint(directory, "last", model, kind="training")
rng = random.Random(0)
for attempt in range(50):
    child = os.fork()
    while child == 0:
        model.step += 1
        save_checkpoint(directory, "last", model, kind="training")
        save_checkpoint(directory, f"step-{model.step % 3}", model, kind="sampler")
    time.sleep(rng.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    model.step = load_checkpoint(directory / "last", probe, with_optimizer=True).step
    names = {info.path.name for info in list_checkpoints(directory)}
    assert names == {path.name for path in directory.iterdir() if not path.name.startswith(".")}, names
print(model.step, sum(path.name.startswith(".") for path in directory.iterdir()))
"""


def test_kill_nine_during_saves(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL_SAVES, str(model_dir("qwen3")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saves, leftovers = map(int, done.stdout.split())
    assert saves > 10, "the child must have saved between the kills"
    assert leftovers > 5, "the kills must have hit saves in progress"
