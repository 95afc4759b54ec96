"""``create_lora_training_client(wandb_config=…)``: wandb itself, offline; what it wrote is read back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_file import config, finished_file, history

from nat_plugin_evsys import ServiceClient, types
from nat_plugin_evsys.errors import ConfigError

wandb = pytest.importorskip("wandb")


def test_every_operation_is_streamed(
    service: ServiceClient, tiny_model: str, train: Any, datums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.teardown()  # a process reads the environment once; another test may have made it do so
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb_config = types.WandbConfig(project="loops", name="first")
    client = service.create_lora_training_client(tiny_model, 4, seed=0, wandb_config=wandb_config).result()
    losses = train(client, 0, 3)
    client.forward(datums(0), "cross_entropy").result()  # is no training
    client.forward_backward_custom(datums(0), lambda d, lps: (sum(lp.sum() for lp in lps), {"mine": 2.0})).result()
    client.close()

    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    path = finished_file(directory)
    rows = history(path)
    assert [row["forward_backward/loss:sum"] for row in rows if "forward_backward/tokens:sum" in row][:3] == losses
    steps = [row for row in rows if "optim_step/grad_norm" in row]
    assert [row["optimizer_step"] for row in steps] == [1, 2, 3]
    assert all(row["optim_step/grad_norm"] > 0 for row in steps)
    assert rows[-1]["forward_backward/mine"] == 2.0
    assert len(rows) == 7
    assert (config(path)["lora_rank"], config(path)["base_model"]) == (4, tiny_model)


def test_what_cannot_stream_is_refused(
    service: ServiceClient, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = {"project": "loops"}
    with pytest.raises(ConfigError, match="wandb_config is a dict; give types"):
        service.create_lora_training_client(tiny_model, wandb_config=given)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed; pip install 'nat_plugin_evsys\[wandb\]'"):
        service.create_lora_training_client(tiny_model, wandb_config=types.WandbConfig(project="loops"))
