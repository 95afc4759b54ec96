"""Base models of few bits: LoRA over bitsandbytes' layers, against PEFT over the same layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny_family
from random_datums import datum
from tinker import types
from tiny import END, byte_tokenizer, perturb, save_byte_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nat_plugin_evsys.engine.checkpoint_loading import load_adapter, load_checkpoint
from nat_plugin_evsys.engine.checkpoints import save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.errors import CheckpointError, ConfigError, ModelError
from nat_plugin_evsys.runtime.export import export_merged
from nat_plugin_evsys.runtime.model_check import check_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (`make test-quantized` installs it)")
peft = pytest.importorskip("peft")

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
"""What a user of transformers types for each of our names."""

SEQUENCES = ([7, 81, 9, 200, 3, 15, 66, 41, 90], [7, 81, 9, 11, 12], [250, 1, 2])


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that speeds bf16 up


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("quantized") / "model", hidden_size=64, intermediate_size=128)


def packed(directory: Path, name: str) -> BaseModel:
    return load_base_model(str(directory), device="cpu", dtype="float32", quantization=name)


def in_peft(directory: Path, name: str, checkpoint: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs and gradients as transformers, bitsandbytes and PEFT compute them when they train."""
    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**SETTINGS[name])
    )
    model = peft.PeftModel.from_pretrained(base, str(checkpoint), is_trainable=True).train()
    logprobs = []
    for tokens in SEQUENCES:
        logits = model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1))
    (-torch.cat(logprobs).sum()).backward()
    grads = {n.replace(".default.", "."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logprobs).detach(), {n.removeprefix("base_model.model."): g for n, g in grads.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_and_sampling_are_those_of_peft(name: str, directory: Path, tmp_path: Path) -> None:
    base = packed(directory, name)
    assert base.identity["quantization"] == name
    model = TrainableModel(base, perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0)))
    save_checkpoint(tmp_path, "checkpoint", model, kind="sampler")
    sampler = Sampler(base)
    try:
        client = sampler.client(model.adapter, 0)
        scores = [client.compute_logprobs(types.ModelInput.from_ints(list(s))).result(60)[1:] for s in SEQUENCES]
    finally:
        sampler.close()
    # After sampling, since bitsandbytes packs some weights for inference on its way.
    output = model.forward_backward([datum(s[:-1], {"target_tokens": s[1:]}) for s in SEQUENCES], "cross_entropy")
    assert output.metrics["plain_path_tokens:sum"] == 0

    expected, gradients = in_peft(directory, name, tmp_path / "checkpoint")
    found = torch.cat([out["logprobs"].to_torch() for out in output.loss_fn_outputs])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor([lp for s in scores for lp in s]), expected, rtol=0, atol=1e-5)
    ours = model.gradient or {}
    assert set(gradients) == set(ours)
    for tensor, gradient in gradients.items():
        assert (ours[tensor] - gradient).norm() <= 1e-5 * gradient.norm(), tensor


@pytest.mark.parametrize(("family", "name"), [("gpt2", "nf4"), ("mixtral", "int8"), ("gemma2", "nf4")])
def test_every_cell_of_the_row_is_right(family: str, name: str, tmp_path: Path) -> None:
    row = check_model(packed(save_tiny_family(family, tmp_path), name))
    assert row.is_right
    assert not row.refused


@pytest.mark.parametrize("name", SETTINGS)
def test_a_directory_that_is_already_packed_is_the_same_model(name: str, directory: Path, tmp_path: Path) -> None:
    options = SETTINGS[name] | ({} if name == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16})
    whole = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )
    whole.save_pretrained(tmp_path)
    byte_tokenizer(END).save_pretrained(tmp_path)
    stored, made = load_base_model(str(tmp_path), device="cpu"), packed(directory, name)
    assert stored.identity == made.identity
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(stored.model(ids).logits, made.model(ids).logits, rtol=0, atol=1e-6)
    other = "int8" if name != "int8" else "nf4"
    with pytest.raises(ConfigError, match=f"is stored as {name}; set quantization to {name} or none"):
        packed(tmp_path, other)


def test_merging_unpacks_the_base_model(directory: Path, tmp_path: Path) -> None:
    for name in ("nf4-double", "int8"):
        base = packed(directory, name)
        adapter = perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0, train_unembed=True))
        assert export_merged(base, adapter, tmp_path / name) <= 1e-5
        merged = load_base_model(str(tmp_path / name), device="cpu")
        assert "quantization" not in merged.identity
    gpt2 = packed(save_tiny_family("gpt2", tmp_path / "gpt2"), "nf4")
    adapter = perturb(LoraAdapter.create(gpt2.model, rank=4, alpha=8.0))
    assert export_merged(gpt2, adapter, tmp_path / "merged-gpt2") <= 1e-5


def test_a_checkpoint_belongs_to_its_packing(directory: Path, tmp_path: Path) -> None:
    base = packed(directory, "nf4")
    model = TrainableModel(base, perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0)))
    save_checkpoint(tmp_path, "checkpoint", model, kind="training")
    again = TrainableModel(base, LoraAdapter.create(base.model, rank=2, alpha=4.0))
    load_checkpoint(tmp_path / "checkpoint", again, with_optimizer=True)
    for found, expected in zip(again.parameters.values(), model.parameters.values(), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(CheckpointError, match=r"another base model.*quantization nf4 / None"):
        load_adapter(tmp_path / "checkpoint", load_base_model(str(directory), device="cpu"))


def test_a_packed_output_head_is_refused(directory: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(**SETTINGS["nf4"], llm_int8_skip_modules=[])
    model = AutoModelForCausalLM.from_pretrained(
        save_byte_model(tmp_path / "untied", hidden_size=64, intermediate_size=128, tie_word_embeddings=False),
        quantization_config=config,
    )
    model.save_pretrained(tmp_path / "packed")
    byte_tokenizer(END).save_pretrained(tmp_path / "packed")
    with pytest.raises(ModelError, match=r"output head is quantized.*llm_int8_skip_modules"):
        load_base_model(str(tmp_path / "packed"), device="cpu")
