"""Acceptance: with `base_url` alone changed a service trains the same; killed and restarted, the run completes.

Engine and service are deterministic, so that rollouts that run at once sample the same tokens in both.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from nat_process import ROOT, first_rows, json_lines, newest_run, run_nat, start_nat
from safetensors.torch import load_file
from serve_process import ServerProcess, start_server

from nat_plugin_evsys.backends.remote.service import TinkerService
from nat_plugin_evsys.cli.runs import evsys

KEY = "tml-local"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = start_server("builtin/tiny", tmp_path_factory.mktemp("service") / "store", "--deterministic")
    yield process
    process.stop()


def make_config(tmp_path: Path, url: str | None) -> Path:
    """configs/tiny.yml on few rows for three epochs, with its runs under ``tmp_path``."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
    config["finetuning"]["output_dir"] = config["llms"]["policy"]["output_dir"] = str(tmp_path / "runs")
    dataset = config["eval"]["general"]["dataset"]
    train = ROOT / dataset["file_path"]
    dataset["file_path"] = str(first_rows(train, 6, tmp_path / "train.json"))
    held_out = first_rows(train.parent / "heldout.json", 4, tmp_path / "heldout.json")
    config["eval"]["general"]["output_dir"] = str(tmp_path / "eval")
    config["eval"]["general"]["max_concurrency"] = 4
    config["trainers"]["trainer"] |= {"validation_dataset": str(held_out), "validation_interval": 1}
    config["trainers"]["trainer"]["keep_checkpoints"] = 1
    config["trajectory_builders"]["builder"]["num_generations"] = 4
    config["finetuning"]["num_epochs"] = 3
    config["llms"]["policy"] |= {"deterministic": True} if url is None else {"base_url": url}
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def curve(tmp_path: Path) -> list[Any]:
    """What the run measured, without what depends on the clock."""
    keys = ("event", "epoch", "reward", "reward_mean", "trained", "loss")
    return [[row.get(key) for key in keys] for row in json_lines(newest_run(tmp_path) / "metrics.jsonl")]


def same_rewards(one: Path, other: Path) -> None:
    """Two runs have measured and trained the same in every epoch."""
    ours, theirs = curve(one), curve(other)
    assert [row[:-1] for row in ours] == [row[:-1] for row in theirs]
    losses = [row[-1] for row in theirs]
    assert [row[-1] for row in ours] == pytest.approx(losses, abs=1e-6)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of the embedded engine lies."""
    directory = tmp_path_factory.mktemp("embedded")
    done = run_nat("finetune", "--config_file", str(make_config(directory, None)))
    assert done.code == 0, done.text[-4000:]
    return directory


def test_a_service_trains_the_same_and_the_same_yaml_serves_it(
    tmp_path: Path, server: ServerProcess, embedded: Path
) -> None:
    config = make_config(tmp_path, server.url)
    done = run_nat("finetune", "--config_file", str(config))
    assert done.code == 0, done.text[-4000:]
    same_rewards(tmp_path, embedded)

    run = newest_run(tmp_path)
    state = json.loads((run / "state.json").read_text())
    last = state["checkpoints"][-1]
    assert re.fullmatch(r"tinker://[^/]+/sampler_weights/epoch-0003", last["adapter"])
    assert re.fullmatch(r"tinker://[^/]+/weights/epoch-0003", last["training_state"])
    stored = server.store / "checkpoints" / last["adapter"].removeprefix("tinker://")
    ours = load_file(newest_run(embedded) / "checkpoints" / "epoch-0003" / "adapter_model.safetensors")
    theirs = load_file(stored / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=0)
    named = {record[key] for record in state["checkpoints"] for key in ("adapter", "training_state")}
    assert on_service(server, last["adapter"]) == named
    for command in ("runs", "show"):
        shown = CliRunner().invoke(evsys, [command, "--output_dir", str(tmp_path / "runs")])
        assert last["adapter"] in shown.output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["adapter"] == last["adapter"]

    scored = run_nat("eval", "--config_file", str(config), "--dataset", str(tmp_path / "heldout.json"))
    assert scored.code == 0, scored.text[-4000:]
    assert last["adapter"] in scored.text
    items = json.loads((tmp_path / "eval" / "right_team_output.json").read_text())["eval_output_items"]
    assert sum(item["score"] for item in items) / len(items) == pytest.approx(summary["heldout_reward_after"])


def on_service(server: ServerProcess, path: str) -> set[str]:
    """The checkpoints that the service has of a path's training run."""
    run = path.removeprefix("tinker://").partition("/")[0]
    listed = TinkerService(server.url, KEY).rest_client().list_checkpoints(run).result()
    return {checkpoint.tinker_path for checkpoint in listed.checkpoints}


def test_a_server_killed_in_epoch_2_and_started_again(tmp_path: Path, embedded: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = start_server("builtin/tiny", tmp_path / "store", "--port", port, "--deterministic")
    try:
        config = make_config(tmp_path, server.url)
        log = tmp_path / "log"
        process = start_nat("finetune", "--config_file", str(config), log=log)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None and "rollouts, epoch 2" not in log.read_text():
            time.sleep(0.02)
        server.kill()
        time.sleep(1)
        assert process.poll() is None, log.read_text()[-4000:]
        assert json.loads((newest_run(tmp_path) / "state.json").read_text())["epochs_done"] == 1
        server = start_server("builtin/tiny", tmp_path / "store", "--port", port, "--deterministic")
        assert process.wait(timeout=180) == 0, log.read_text()[-4000:]
    finally:
        server.stop()
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert summary["epochs"] == 3
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())
    assert "infrastructure_error" not in summary["dropped"]
    same_rewards(tmp_path, embedded)


def test_a_service_that_is_not_there_is_one_readable_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = make_config(tmp_path, url)
    assert run_nat("validate", "--config_file", str(config)).code == 0
    done = run_nat("finetune", "--config_file", str(config), timeout=60)
    assert done.code != 0
    assert f"base_url {url} does not answer" in done.text
    assert "start `nat evsys serve` there" in done.text
    assert not (tmp_path / "runs").exists()
