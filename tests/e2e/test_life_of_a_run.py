"""Acceptance: a killed run resumes, a failing loss fails the command, the same YAML serves what was trained."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from nat_process import ROOT, Finished, first_rows, json_lines, newest_run, run_nat, start_nat

from nat_plugin_evsys.runs import RunDirectory

QUESTION = "My wifi is broken."


def small(config: dict[str, Any], tmp_path: Path) -> None:
    """configs/tiny.yml on few rows."""
    dataset = config["eval"]["general"]["dataset"]
    train = ROOT / dataset["file_path"]
    dataset["file_path"] = str(first_rows(train, 6, tmp_path / "train.json"))
    held_out = first_rows(train.parent / "heldout.json", 4, tmp_path / "heldout.json")
    config["trainers"]["trainer"]["validation_dataset"] = str(held_out)
    config["trainers"]["trainer"]["validation_interval"] = 1
    config["trajectory_builders"]["builder"]["num_generations"] = 4


def finished_epochs(run: Path) -> int:
    return json.loads((run / "state.json").read_text())["epochs_done"]


def test_sigterm_in_epoch_2_of_4_then_resume(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    def change(settings: dict[str, Any]) -> None:
        small(settings, tmp_path)
        settings["trainers"]["trainer"]["validation_interval"] = 3  # overridden by what is typed
        settings["trainer_adapters"]["adapter"]["lr_schedule"] = "wsd"

    config = make_config("tiny", change)
    arguments = ("finetune", "--config_file", str(config), "--validation_interval", "1")
    arguments += ("-o", "finetuning.num_epochs", "4")
    process = start_nat(*arguments, log=tmp_path / "first.log")
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "runs" / "latest").exists() and finished_epochs(newest_run(tmp_path)) == 1:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143, (tmp_path / "first.log").read_text()[-3000:]
    assert "Traceback" not in (tmp_path / "first.log").read_text()
    assert "-o trainers.trainer.resume true" in (tmp_path / "first.log").read_text()

    run = newest_run(tmp_path)
    assert finished_epochs(run) == 1
    assert json.loads((run / "state.json").read_text())["status"] == "interrupted"

    done = run_nat(*arguments, "-o", "trainers.trainer.resume", "true")
    assert done.code == 0, done.text[-4000:]
    assert newest_run(tmp_path) == run
    epochs = [row["epoch"] for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch"]
    validations = [row["epoch"] for row in json_lines(run / "metrics.jsonl") if row["event"] == "validation"]
    assert epochs == [1, 2, 3, 4]
    assert validations == [0, 1, 2, 3, 4]
    check_warm_up([row["job"]["metrics"] for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epochs"] == 4
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())
    assert done.out.rstrip().splitlines()[-1] == str(run / "summary.json")
    assert str(run / "report.html") in done.out
    assert '"status":"finished"' in (run / "report.html").read_text().replace(" ", "")
    kept = Counter(RunDirectory.open(run).rollouts.collections())
    expected = [("train", 0), ("heldout", 0), *((kind, epoch) for epoch in epochs for kind in ("epoch", "heldout"))]
    assert kept == Counter([*expected, ("train", 4)])
    sizes = {"epoch": 24, "heldout": 4, "train": 6}
    for collection in kept:
        assert len(list(RunDirectory.open(run).rollouts.lines(collection))) == sizes[collection.kind]


def test_a_run_with_a_torn_state_resumes_from_the_one_before(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    config = make_config("tiny", lambda settings: small(settings, tmp_path))

    def finetune(epochs: int, *options: str) -> Finished:
        return run_nat("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs", str(epochs), *options)

    assert finetune(1).code == 0
    run = newest_run(tmp_path)
    (run / "state.json").write_text('{"format": 1, "sta')
    refused = finetune(2, "-o", "trainers.trainer.resume", "true")
    assert refused.code == 1
    assert "set the trainer's resume: previous" in " ".join(refused.err.split())

    done = finetune(2, "-o", "trainers.trainer.resume", "previous")
    assert done.code == 0, done.text[-4000:]
    assert newest_run(tmp_path) == run
    assert finished_epochs(run) == 2
    assert [row["epoch"] for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch"] == [1, 2]


def test_a_run_of_which_no_checkpoint_can_be_loaded_stays_as_it_is(
    tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    config = make_config("tiny", lambda settings: small(settings, tmp_path))
    arguments = ("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs")
    assert run_nat(*arguments, "1").code == 0
    run = newest_run(tmp_path)
    for weights in run.glob("checkpoints/*/adapter_model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del before[run / "environment.json"]  # it names each session
    assert {"checkpoints/epoch-0000/manifest.json", "checkpoints/epoch-0001/manifest.json", "summary.json"} <= {
        str(path.relative_to(run)) for path in before
    }

    refused = run_nat(*arguments, "2", "-o", "trainers.trainer.resume", "previous")
    assert refused.code == 1
    last = refused.err.rstrip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "epoch-0001" in last, "the newest one's error is the one to show"
    after = {path: path.read_bytes() for path in run.rglob("*") if path in before}
    assert after == before


def test_a_run_that_is_resumed_for_fewer_epochs_measures_what_it_ends_with(
    tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    def change(settings: dict[str, Any]) -> None:
        small(settings, tmp_path)
        settings["trainers"]["trainer"]["validation_interval"] = 4

    config = make_config("tiny", change)
    arguments = ("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs")
    log = tmp_path / "log"
    process = start_nat(*arguments, "4", log=log)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs" / "latest").exists() or finished_epochs(newest_run(tmp_path)) < 1:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    process.terminate()
    process.wait(timeout=60)
    run = newest_run(tmp_path)
    done_epochs = finished_epochs(run)
    assert done_epochs < 4

    done = run_nat(*arguments, str(done_epochs), "-o", "trainers.trainer.resume", "true")
    assert done.code == 0, done.text[-4000:]
    validations = [row for row in json_lines(run / "metrics.jsonl") if row["event"] == "validation"]
    assert [row["epoch"] for row in validations] == [0, done_epochs]
    assert json.loads((run / "summary.json").read_text())["heldout_reward_after"] == validations[-1]["reward"]


def check_warm_up(jobs: list[dict[str, Any]]) -> None:
    """Step k runs at k sixteenths of tiny.yml's rate, which `wsd` lowers in the second half, times what earlier jobs
    have measured, over the resume too.
    """
    taken, factor = 0, 1.0
    for epoch, job in enumerate(jobs):
        count = int(job["steps"])
        shares = [(epoch + step / count) / len(jobs) for step in range(count)]
        rates = [2e-3 * factor * min(1, 2 * (1 - share)) * (taken + step) / 16 for step, share in enumerate(shares, 1)]
        assert job["learning_rate"] == pytest.approx(sum(rates) / count)
        taken, factor = taken + count, job["lr_factor"]
    assert 1 < taken < 16


def ask_server(config: Path, log: Path) -> str:
    """What `nat serve` on the same YAML answers over HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_nat("serve", "--config_file", str(config), "--host", "127.0.0.1", "--port", str(port), log=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                url, question = f"http://127.0.0.1:{port}/generate", {"input_message": QUESTION}
                return httpx.post(url, json=question, timeout=60, trust_env=False).json()["value"]
            except httpx.TransportError:
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_the_same_yaml_serves_what_was_trained(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    output = tmp_path / "eval"

    def change(settings: dict[str, Any]) -> None:
        small(settings, tmp_path)
        settings["eval"]["general"]["output_dir"] = str(output)

    config = make_config("tiny", change)
    done = run_nat("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs", "1")
    assert done.code == 0, done.text[-4000:]
    run = newest_run(tmp_path)
    last = [row for row in json_lines(run / "metrics.jsonl") if row["event"] == "validation"][-1]

    scored = run_nat("eval", "--config_file", str(config), "--dataset", str(tmp_path / "heldout.json"))
    assert scored.code == 0, scored.text[-4000:]
    assert str(run / "checkpoints" / "epoch-0001") in scored.text
    items = json.loads((output / "right_team_output.json").read_text())["eval_output_items"]
    scores = [item["score"] for item in items]
    assert sum(scores) / len(scores) == pytest.approx(last["reward"])

    served = ask_server(config, tmp_path / "serve.log")
    assert served

    answered = run_nat("run", "--config_file", str(config), "--input", QUESTION)
    assert answered.code == 0, answered.text[-4000:]
    assert "Workflow Result" in answered.text
    assert served in answered.text
    assert str(run / "checkpoints" / "epoch-0001") in answered.text


def test_a_failing_loss_fails_the_command_with_its_cause(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    def change(settings: dict[str, Any]) -> None:
        small(settings, tmp_path)
        settings["trainer_adapters"]["adapter"]["learning_rate"] = 1e30

    config = make_config("tiny", change)
    done = run_nat("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs", "3")
    assert done.code != 0
    state = json.loads((newest_run(tmp_path) / "state.json").read_text())
    assert state["status"] == "failed"
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith("Error: "), done.text[-2000:]


def test_overlapping_rollouts_are_at_most_one_version_old(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    def change(settings: dict[str, Any]) -> None:
        small(settings, tmp_path)
        settings["trainers"]["trainer"]["overlap_rollouts"] = True

    config = make_config("tiny", change)
    done = run_nat("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs", "3")

    assert done.code == 0, done.text[-4000:]
    rows = [row for row in json_lines(newest_run(tmp_path) / "metrics.jsonl") if row["event"] == "epoch"]
    assert set(rows[0]["staleness"]) == {"0"}
    assert set(rows[1]["staleness"]) | set(rows[2]["staleness"]) in ({"1"}, {"0", "1"})
    assert all(sum(row["staleness"].values()) == row["calls"] == 24 for row in rows)
    assert "loss_fn is ppo" in done.text
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())
