"""Policy versions that vLLM cannot be given are sampled by the embedded engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError
from tiny import byte_tokenizer, tiny_model

from nat_plugin_evsys.backends.vllm import rollouts as module
from nat_plugin_evsys.backends.vllm.rollouts import VllmRollouts
from nat_plugin_evsys.config.vllm import VllmConfig
from nat_plugin_evsys.engine.model.loading import wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter


@pytest.fixture
def rollouts(tmp_path: Path) -> Iterator[VllmRollouts]:
    config = VllmConfig(base_url="http://127.0.0.1:9", adapter_dir=tmp_path)
    base = wrap_model("m", tiny_model("qwen3", vocab_size=300), byte_tokenizer())
    made = VllmRollouts(base, config, "m", rank=2, temperature=1.0, max_batch_size=4)
    yield made
    made.close()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
async def test_a_full_disk_leaves_a_policy_version_to_the_embedded_engine(
    error: Exception,
    rollouts: VllmRollouts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    threads: list[threading.Thread] = []

    def write(directory: Path, *_: Any) -> None:
        threads.append(threading.current_thread())
        (directory / "adapter_model.safetensors").write_bytes(b"the first bytes")
        raise error

    monkeypatch.setattr(module, "write_adapter", write)
    adapter = LoraAdapter.create(rollouts._base.model, rank=2, alpha=4)
    embedded: Any = SimpleNamespace(policy_version=3, adapter=adapter)
    with caplog.at_level(logging.WARNING):
        assert await rollouts.client(embedded, forward=None) is embedded  # type: ignore[arg-type]
    assert "policy version 3 is sampled by the embedded engine: its adapter could not be written to" in caplog.text
    assert "No space left" in caplog.text
    assert threads != [threading.current_thread()]
    assert list(rollouts._directory.iterdir()) == [], "what was written of it takes no room"
