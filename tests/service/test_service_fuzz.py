"""Hostile requests: every one is answered, nothing is written outside the store, and the server still trains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import tinker
import torch
from serve_process import ServerProcess
from service_fuzzer import fuzz
from tinker import types

KEY = "tml-fuzzed-0123456789"
OTHER = "tml-other-0123456789"


def test_hostile_requests_do_no_harm(start: Callable[..., ServerProcess], served_model: Path, tmp_path: Path) -> None:
    server = start("--api-key", KEY, "--api-key", OTHER, "--poll-seconds", "1")
    before = _train(server.url, served_model)
    outside = _files_outside(tmp_path)

    findings = asyncio.run(fuzz(server.url, KEY, str(served_model), requests=1500, seed=0))

    assert findings.broken == []
    assert findings.statuses[200] > 100
    assert findings.statuses[401] > 50
    assert _files_outside(tmp_path) == outside
    assert _train(server.url, served_model) == before


def _files_outside(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if not path.is_relative_to(root / "store")}


def _train(url: str, model: Path) -> list[float]:
    """The losses of a few steps from a fixed seed, with another key than the fuzzer's."""
    ids = [5, 9, 40, 41, 7]
    inputs = {
        "target_tokens": types.TensorData.from_torch(torch.tensor(ids[1:])),
        "weights": types.TensorData.from_torch(torch.ones(4)),
    }
    datum = types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)
    losses = []
    with tinker.ServiceClient(base_url=url, api_key=OTHER) as service:
        client = service.create_lora_training_client(str(model), rank=4, seed=0).result()
        for _ in range(3):
            losses.append(client.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"])
            client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return losses
