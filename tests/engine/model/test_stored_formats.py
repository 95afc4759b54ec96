"""Checkpoints whose weights are quantized: unpacked, or refused with what to do. None of it needs bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from tiny import SHAPE, VOCAB, byte_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from nat_plugin_evsys.engine.model import quantized
from nat_plugin_evsys.engine.model.loading import load_base_model
from nat_plugin_evsys.errors import ConfigError, ModelError

BLOCK = 16
E2M1 = torch.tensor([sign * size for sign in (1, -1) for size in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
"""The numbers of MXFP4's codes (OCP Microscaling Formats 1.0, 5.3.3)."""


def save_with(directory: Path, source: Path, **quantization_config: Any) -> Path:
    """A copy of a model directory whose config.json says that it is quantized."""
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
    return directory


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's blocks: ``(float8 weight, scale of each block, the weight that they mean)``."""
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = stored.float() * scale[:, None, :, None]
    return stored.view(rows, columns).contiguous(), scale, meant.view(rows, columns)


def test_fp8_is_unpacked(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = save_with(tmp_path, model_dir("llama"), quant_method="fp8", weight_block_size=[BLOCK, BLOCK])
    tensors, expected = load_file(path / "model.safetensors"), {}
    for name in [name for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2]:
        tensors[name], tensors[f"{name}_scale_inv"], expected[name] = in_fp8(tensors[name])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    base = load_base_model(str(path), device="cpu", dtype="float32")
    for name, weight in expected.items():
        assert torch.equal(base.model.get_parameter(name), weight)
    base.model.save_pretrained(tmp_path / "again")
    base.tokenizer.save_pretrained(tmp_path / "again")
    assert load_base_model(str(tmp_path / "again"), device="cpu").identity == base.identity
    with pytest.raises(ConfigError, match="fp8 checkpoint, which is unpacked at load and not packed again"):
        load_base_model(str(path), device="cpu", quantization="nf4")


def test_mxfp4_is_unpacked(tmp_path: Path) -> None:
    sizes = {**SHAPE, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
    AutoModelForCausalLM.from_config(GptOssConfig(**sizes)).save_pretrained(tmp_path / "plain")
    byte_tokenizer(letters=VOCAB - 1).save_pretrained(tmp_path / "plain")
    path = save_with(tmp_path, tmp_path / "plain", quant_method="mxfp4")
    tensors, expected = load_file(path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(120, 126, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        values = E2M1[codes] * torch.exp2(exponents[..., None].float() - 127)
        expected[name] = values.view(experts, outputs, inputs).mT
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    base = load_base_model(str(path), device="cpu", dtype="float32")
    assert len(expected) == 2 * SHAPE["num_hidden_layers"]
    for name, weight in expected.items():
        assert torch.equal(base.model.get_parameter(name), weight)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_format_that_cannot_be_trained_through_is_refused_by_name(
    method: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = save_with(tmp_path, model_dir("llama"), quant_method=method, bits=4)
    with pytest.raises(ModelError, match=rf"is a {method} checkpoint, .*give the model that it was made from, with"):
        load_base_model(str(path), device="cpu")


def test_what_is_missing_or_mistaken_is_said(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model_dir("qwen2")
    with pytest.raises(
        ConfigError, match="quantization 'q4_0' is unknown; use one of none, nf4, nf4-double, fp4, int8"
    ):
        load_base_model(str(plain), device="cpu", quantization="q4_0")
    with pytest.raises(ConfigError, match="is a GGUF file, which is unpacked; set quantization to none"):
        load_base_model(str(write_gguf(plain, tmp_path / "small.gguf")), device="cpu", quantization="nf4")
    monkeypatch.setattr(quantized, "READERS", ("accelerate", "not_installed"))
    with pytest.raises(
        ModelError, match=r"with quantization nf4 needs packages.*: pip install accelerate bitsandbytes"
    ):
        load_base_model(str(plain), device="cpu", quantization="nf4")
    (tmp_path / "stored").mkdir()
    stored = save_with(tmp_path / "stored", plain, quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(ModelError, match="is stored as int8, and needs packages that are not installed"):
        load_base_model(str(stored), device="cpu")
