"""``nat evsys export`` and ``check``: what is written computes what was trained, in transformers and PEFT alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families import save_tiny_family
from peft import PeftModel
from tiny import perturb
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from nat_plugin_evsys.cli.runs import evsys
from nat_plugin_evsys.engine.checkpoints import FrozenWeights, save_checkpoint
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.runs import RunDirectory

IDS = torch.tensor([[5, 17, 99, 3, 42, 150, 7, 7, 31, 180, 2, 64]])


def trained(family: str, root: Path) -> tuple[BaseModel, LoraAdapter, Path]:
    base = load_base_model(str(save_tiny_family(family, root / family)), device="cpu", dtype="float32")
    adapter = perturb(LoraAdapter.create(base.model, rank=3, alpha=6.0, train_unembed=True), seed=4).snapshot()
    return base, adapter, save_checkpoint(root, "saved", FrozenWeights(base, adapter, 1), kind="sampler")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(evsys, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # GPT-2 has layers of both kinds; PEFT asks each
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "deepseek_v3"])
def test_merged_and_alone_compute_what_was_trained(family: str, tmp_path: Path) -> None:
    base, adapter, saved = trained(family, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base.name)
    before = logits(plain)
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    assert "loaded back" in run("export", saved, "--merge", "--output", merged)
    run("export", saved, "--adapter", "--output", alone)
    deltas = {name: adapter.scale * (b @ a) for name, (a, b) in adapter.weights.items()}
    changed = {
        f"{name}.weight": plain.get_parameter(f"{name}.weight")
        + (delta.T if isinstance(plain.get_submodule(name), Conv1D) else delta)
        for name, delta in deltas.items()
    }
    with torch.no_grad():
        expected = torch.func.functional_call(plain, changed, kwargs={"input_ids": IDS}, tie_weights=False).logits
    assert float((before - expected).abs().max()) > 0.1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=1e-4, atol=1e-4)
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), alone)
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)


def test_what_exists_is_not_overwritten_and_a_form_must_be_named(tmp_path: Path) -> None:
    _, _, saved = trained("llama", tmp_path)
    taken = CliRunner().invoke(evsys, ["export", str(saved), "--merge", "--output", str(tmp_path)])
    assert taken.exit_code == 1
    assert "exists already" in taken.output
    assert CliRunner().invoke(evsys, ["export", str(saved)]).exit_code == 2


def test_a_run_on_a_service_says_how_its_weights_are_fetched(tmp_path: Path) -> None:
    run_dir = RunDirectory.create(tmp_path)
    places = {"adapter": "tinker://a:train:0/sampler_weights/last", "training_state": "tinker://a:train:0/weights/last"}
    run_dir.record_checkpoint("last", 1, 0.5, **places)
    run_dir.save_state()
    told = CliRunner().invoke(evsys, ["export", "--merge", "--output_dir", str(tmp_path)])
    assert told.exit_code == 1
    assert "tinker checkpoint download tinker://a:train:0/weights/last" in told.output


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(evsys, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("status", ["running", "failed"])
def test_what_a_run_has_not_trained_is_not_exported(status: Any, tmp_path: Path) -> None:
    made = RunDirectory.create(tmp_path)
    for epochs in (0, 1):
        made.state.status = status
        made.save_state()
        said = refusal("export", "--adapter", "--output_dir", tmp_path)
        assert f"has trained nothing (it is {status}), so there is nothing to export" in said, epochs
        made.record_checkpoint("start", 0, 0.5, trained=False)


def test_best_without_a_reward_is_refused_and_the_default_is_then_the_latest(tmp_path: Path) -> None:
    made = RunDirectory.create(tmp_path)
    base, adapter, _ = trained("llama", tmp_path)
    save_checkpoint(made.checkpoints_dir, "epoch-1", FrozenWeights(base, adapter, 1), kind="sampler")
    made.record_checkpoint("epoch-1", 1, None)
    made.save_state()
    said = refusal("export", "--adapter", "--checkpoint", "best", "--output_dir", tmp_path)
    assert f"--checkpoint best: no checkpoint of run {made.path} has a reward; set --checkpoint latest" in said
    assert "epoch-1-adapter" in run("export", "--adapter", "--output_dir", tmp_path)


def test_check_prints_the_row(tmp_path: Path) -> None:
    printed = run("check", save_tiny_family("llama_tied", tmp_path))
    cells = "training fast sampling fast loss ok gradient ok sampler ok adapter ok"
    assert printed.split() == cells.split()
    refused = CliRunner().invoke(evsys, ["check", str(save_tiny_family("bert", tmp_path / "bert"))])
    assert refused.exit_code == 1
    assert "choose another model family" in refused.output
