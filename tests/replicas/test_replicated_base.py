"""The copy of the base model that the process beside the replicas has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nat_plugin_evsys.engine.model.loading import load_base_model
from nat_plugin_evsys.replicas import base as replicated
from nat_plugin_evsys.replicas.base import Replicas, ReplicatedBase


class PoolOnGpus:
    """Of replicas whose GPUs make bfloat16 of ``dtype: auto``."""

    dtype = "bfloat16"

    def __init__(self, *_: Any) -> None:
        self.identity = load_base_model("builtin/tiny", device="cpu", dtype=self.dtype).identity

    def close(self) -> None:
        """Nothing runs."""


def test_it_is_in_the_dtype_of_the_replicas_which_vllm_is_started_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicated, "ReplicaPool", PoolOnGpus)
    shared = ReplicatedBase.open("builtin/tiny", replicas=Replicas(1))
    assert (shared.base.dtype, shared.base.device.type) == (torch.bfloat16, "cpu")
    assert {each.dtype for each in shared.base.model.parameters()} == {torch.bfloat16}
    shared.close()
