"""Acceptance: a real model learns through constrained tool calls of several turns, trained token for token."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from exchanges import check_token_exact
from nat_process import CAPTURE_DIR, ROOT, json_lines, newest_run, plugin_path, run_nat

EPOCHS = int(os.environ.get("EPOCHS", "6"))


@pytest.mark.timeout(5400)
def test_smollm2_learns_through_constrained_calls(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/quickstart.yml").read_text())
    config["workflow"] = {"_type": "constrained_desk", "llm_name": "policy"}
    config["llms"]["policy"] |= {"max_tokens": 48, "output_dir": str(tmp_path / "runs"), "lora_rank": 16}
    config["eval"]["general"] |= {"output_dir": str(tmp_path / "eval"), "max_concurrency": 32}
    config["finetuning"] |= {"output_dir": str(tmp_path / "runs"), "num_epochs": EPOCHS}
    trainer = config["trainers"]["trainer"]
    del trainer["warm_start"]
    config["trainer_adapters"]["adapter"] |= {"save_datums": True, "learning_rate": 5e-4}
    for settings, key in ((config["eval"]["general"]["dataset"], "file_path"), (trainer, "validation_dataset")):
        settings[key] = str(ROOT / settings[key])
    path = tmp_path / "constrained.yml"
    path.write_text(yaml.safe_dump(config))
    capture = tmp_path / "http.jsonl"
    done = run_nat(
        "finetune",
        "--config_file",
        str(path),
        timeout=5000,
        PYTHONPATH=plugin_path(tmp_path, ["constrained_desk"], ROOT / "interop", CAPTURE_DIR),
        EVSYS_TEST_HTTP_CAPTURE=str(capture),
    )
    assert done.code == 0, done.text[-4000:]

    run = newest_run(tmp_path)
    checked = check_token_exact(capture, run)
    # Every call parsed: the workflow fails at one that does not, and a rollout that fails has no reward.
    assert all(exchange.finish_reason == "tool_calls" for exchange in checked.exchanges)
    assert any(len(datum["calls"]) > 1 for datum in checked.datums), "no two turns of an episode were merged"
    metrics = json_lines(run / "metrics.jsonl")
    scores = [row["reward_mean"] for row in metrics if row.get("reward_mean") is not None]
    summary = checked.summary
    print(json.dumps({key: summary.get(key) for key in ("calls", "trained", "dropped", "prompts")}), scores)
    assert all(row["job"]["metrics"]["forced_tokens"] > 0 for row in metrics if "job" in row)
    # Four desks, so a guess gives 0.25; three standard errors of 256 rollouts are 0.08.
    assert scores[-1] > scores[0] + 0.15, scores
