"""Acceptance: an agent that shows its policy pictures is finetuned, resumed bit for bit, and served."""

from __future__ import annotations

import gzip
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from nat_process import ROOT, json_lines, newest_run, plugin_path, run_nat, start_nat
from tiny_vision import VOCAB, chat_template, save_vision_model

from nat_plugin_evsys.call_images import sha256_of

EPOCHS = 4
CHOICES = {"b": 65, "d": 67}
"""What the policy may answer, bright or dark, and its tokens."""


@pytest.fixture
def setting(tmp_path: Path, make_config: Callable[..., Path]) -> Callable[..., tuple[Path, dict[str, str]]]:
    """``setting(name)``: a configuration with a run directory of its own, and the environment that it needs."""
    model = save_vision_model("qwen2_5_vl", tmp_path / "model")
    (model / "chat_template.jinja").write_text(chat_template("qwen2_5_vl"))
    env = {"PYTHONPATH": plugin_path(tmp_path / "plugins", ["picture_agents"], ROOT / "tests" / "support")}
    for name, levels in (("train", (0, 255, 20, 235, 40, 215)), ("held", (5, 250, 15, 240, 25, 230, 30, 225))):
        rows = [
            {"id": str(i), "question": f"{'x' * (i % 3 + 1)} {level}", "answer": "db"[level > 127]}
            for i, level in enumerate(levels)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))

    def make(name: str) -> tuple[Path, dict[str, str]]:
        def change(config: dict[str, Any]) -> None:
            output = str(tmp_path / name / "runs")
            policy = {"base_model": str(model), "output_dir": output, "max_tokens": 1, "lora_rank": 8}
            config["llms"]["policy"] |= {**policy, "deterministic": True}
            config["workflow"] = {
                "_type": "picture_agent",
                "llm_name": "policy",
                "choices": list(CHOICES.values()),
                "vocabulary": VOCAB,
            }
            config["eval"]["general"]["dataset"]["file_path"] = str(tmp_path / "train.json")
            config["eval"]["evaluators"] = {"right": {"_type": "both_replies"}}
            config["finetuning"] |= {"output_dir": output, "num_epochs": EPOCHS, "reward_function": {"name": "right"}}
            settings = {"learning_rate": 1e-2, "groups_per_step": 2, "save_datums": True}
            config["trainer_adapters"]["adapter"] |= settings
            held = {"validation_dataset": str(tmp_path / "held.json"), "validation_interval": EPOCHS}
            config["trainers"]["trainer"] |= held

        config = make_config("tiny", change)
        return config.rename(tmp_path / f"{name}.yml"), env

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / f"epoch-{EPOCHS:04d}" / "adapter_model.safetensors")


def test_a_run_with_images(tmp_path: Path, setting: Any) -> None:
    config, env = setting("whole")
    done = run_nat("finetune", "--config_file", str(config), **env)
    assert done.code == 0, done.text[-4000:]
    whole = newest_run(tmp_path / "whole")

    rows = json_lines(whole / "metrics.jsonl")
    held_out = [row["reward"] for row in rows if row["event"] == "validation"]
    sampled = [row["reward_mean"] for row in rows if row["event"] == "epoch"]
    print(f"held-out {held_out}, sampled {sampled}")
    assert held_out[-1] > held_out[0]
    assert sampled[-1] > sampled[0] + 0.2
    check_on_policy(whole)
    check_files(whole)

    config, env = setting("parts")
    interrupt_after(2, tmp_path / "parts", "finetune", "--config_file", str(config), **env)
    resumed = run_nat("finetune", "--config_file", str(config), "-o", "trainers.trainer.resume", "true", **env)
    assert resumed.code == 0, resumed.text[-4000:]
    parts = newest_run(tmp_path / "parts")
    assert json.loads((parts / "summary.json").read_text())["epochs"] == EPOCHS
    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(bool(value.any()) for value in expected.values())

    for question, reply in (("xx 3", "d"), ("xx 252", "b")):
        served = run_nat("run", "--config_file", str(config), "--input", question, **env)
        assert served.code == 0, served.text[-4000:]
        assert f"{reply}|{reply}" in served.text


def interrupt_after(epochs: int, directory: Path, *command: str, **env: str) -> None:
    """Run a command until so many epochs are committed, and send it SIGTERM."""
    log = directory.with_suffix(".log")
    process = start_nat(*command, log=log, **env)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (directory / "runs" / "latest").exists() and state(newest_run(directory))["epochs_done"] == epochs:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, log.read_text()[-3000:]
    found = state(newest_run(directory))
    assert (found["epochs_done"], found["status"]) == (epochs, "interrupted")


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "state.json").read_text())
    return found


def check_on_policy(run: Path) -> None:
    """Each rollout's two turns are one Datum, and the learner's first logprobs are those that were sampled."""
    job = next(row for row in json_lines(run / "jobs.jsonl") if row["event"] == "finished")
    assert job["calls"] == job["trained"] + sum(job["dropped"].values())
    datums = json_lines(run / f"datums-{job['job_id']}.jsonl")
    assert {len(datum["calls"]) for datum in datums} == {2}
    assert {len(datum["images"]) for datum in datums} == {1}
    step = min(datum["step"] for datum in datums)
    first = {call["call_id"] for datum in datums if datum["step"] == step for call in datum["calls"]}
    said = [each for line in lines(run, "epoch-0001") for each in line["steps"] if "metrics" in each]
    assert [each["extra"]["history"] for each in said] == ["new", "extended"] * (len(said) // 2)
    trained = [each["metrics"] for each in said if each["extra"]["call_id"] in first]
    assert len(trained) == len(first) > 0
    gaps = [
        abs(one - other)
        for metrics in trained
        for one, other in zip(metrics["extra"]["learner_logprobs"], metrics["logprobs"], strict=True)
    ]
    print(f"largest gap of {len(gaps)} logprobs at the first step: {max(gaps):.1e}")
    assert max(gaps) < 1e-4


def lines(run: Path, collection: str) -> list[dict[str, Any]]:
    with gzip.open(run / "rollouts" / f"{collection}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def check_files(run: Path) -> None:
    """Every image is kept once, by its hash, and no rollout has one in it."""
    kept = {f"images/{path.name}": path.read_bytes() for path in (run / "rollouts" / "images").iterdir()}
    assert {path.split("/")[1].split(".")[0] for path in kept} == {sha256_of(data) for data in kept.values()}
    named = set()
    for path in (run / "rollouts").glob("*.gz"):
        text = gzip.decompress(path.read_bytes()).decode()
        assert "base64" not in text
        named |= {
            part["source"]["path"]
            for line in text.splitlines()
            for step in json.loads(line)["steps"]
            if isinstance(step["message"], list)
            for part in step["message"]
            if part["type"] == "image"
        }
    assert named == kept.keys()
    assert len(kept) == 14  # six rows and eight held-out ones
