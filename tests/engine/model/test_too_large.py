"""A model that memory does not suffice for says what is needed and what there is."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.engine.model.loading import load_base_model
from nat_plugin_evsys.errors import ModelError


def test_memory_that_runs_out_is_said_with_its_size(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 2**30, used + 2**30))
    assert 0 < free_bytes(torch.device("cpu")) <= 2**30

    def allocate(*args: object, **kwargs: object) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    plain = model_dir("qwen2")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", allocate)
    with pytest.raises(
        ModelError, match=r"os error 12\); its weight files have 0\.00 GB, and this process may have [01]\."
    ):
        load_base_model(str(plain), device="cpu")
