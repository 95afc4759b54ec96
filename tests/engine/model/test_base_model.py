"""Loading base models, and the readable refusals."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXT, VOCAB, byte_tokenizer

from nat_plugin_evsys.engine.model.loading import BaseModel, default_cache_dir, load_base_model
from nat_plugin_evsys.errors import ConfigError, ModelError


def test_a_loaded_model_is_frozen_and_described(model_dir: Callable[[str], Path]) -> None:
    base = load_base_model(str(model_dir("qwen3")), device="cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert (base.dtype, base.device.type) == (torch.float32, "cpu")
    assert (base.context_length, base.vocab_size) == (CONTEXT, VOCAB)
    assert base.identity["model_type"] == "qwen3"
    assert base.tokenizer.decode(base.tokenizer.encode("Hi")) == "Hi"
    assert load_base_model(str(model_dir("qwen3")), context_length=64).context_length == 64


def test_identity_is_that_of_the_weights(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = model_dir("llama")
    moved = shutil.copytree(path, tmp_path / "elsewhere")
    one, other = (load_base_model(str(p), device="cpu") for p in (path, moved))
    low = load_base_model(str(path), device="cpu", dtype="bfloat16")
    assert low.dtype == torch.bfloat16
    assert one.identity == other.identity == low.identity
    with torch.no_grad():
        other.model.get_submodule("model.norm").weight[0] += 1.0  # type: ignore[index,operator,union-attr]
    other.model.save_pretrained(tmp_path / "changed")
    shutil.copy(path / "tokenizer.json", tmp_path / "changed")
    changed = load_base_model(str(tmp_path / "changed"), device="cpu")
    assert changed.identity["weights_sha256"] != one.identity["weights_sha256"]
    assert changed.identity["config_sha256"] == one.identity["config_sha256"]


@pytest.mark.parametrize(
    "name", ["/no/such/dir", "./nope", "../nope", "~/no-such-dir", "a/b/c", "models/", "C:\\x", ""]
)
def test_a_missing_directory_fails_at_once_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"give an existing model directory, a hub id such as") as caught:
        load_base_model(name)
    assert time.monotonic() - started < 1
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_readable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ModelError, match=r"no-such-org/no-such-model.*hub") as caught:
        load_base_model("no-such-org/no-such-model")
    assert "\n" not in str(caught.value)


def test_incomplete_directories(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without config\.json"):
        load_base_model(str(tmp_path))
    partial = shutil.copytree(model_dir("llama"), tmp_path / "partial")
    (partial / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(str(partial))
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_dir("llama") / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_base_model(str(partial))


def test_bad_settings(model_dir: Callable[[str], Path]) -> None:
    path = str(model_dir("qwen3"))
    for options, message in (
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"device": "warp"}, "device 'warp'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_base_model(path, **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA GPU"):
            load_base_model(path, device="cuda")
    for length in (1, CONTEXT + 1):
        with pytest.raises(ModelError, match=f"context_length {length} does not fit"):
            load_base_model(path, context_length=length)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(model_dir("qwen3"), tmp_path / "model")
    byte_tokenizer(letters=VOCAB + 1).save_pretrained(path)
    with pytest.raises(ModelError, match=f"has {VOCAB + 1} tokens, and the model knows {VOCAB}"):
        load_base_model(str(path))


def test_cache_dir_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVSYS_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("EVSYS_CACHE")
    assert default_cache_dir() == Path("~/.cache/nat_plugin_evsys").expanduser()


def test_logit_changes_that_are_not_known_are_refused(base_of: Callable[[str], BaseModel]) -> None:
    from nat_plugin_evsys.engine.model.forward import OutputHead

    model = base_of("gemma2").model
    OutputHead(model)
    softcap = model.config.final_logit_softcapping
    try:
        head = model.get_output_embeddings()
        handle = model.register_forward_hook(lambda m, a, out: out.__class__(logits=out.logits + 5))
        with pytest.raises(ModelError, match="changes its logits"):
            OutputHead(model)
        handle.remove()
        assert head is not None
    finally:
        assert model.config.final_logit_softcapping == softcap


def test_config_of_another_shape_has_another_identity(base_of: Callable[[str], BaseModel]) -> None:
    identities = [json.dumps(base_of(f).identity, sort_keys=True) for f in ("qwen3", "qwen2", "llama", "mixtral")]
    assert len(set(identities)) == 4
