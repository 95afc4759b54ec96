"""`nat finetune` with ``ray:`` rolls out and earns what it does without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from nat_process import ROOT, run_nat

pytest.importorskip("ray", reason="needs Ray: make test-ray")


def finetuned(directory: Path, **policy: Any) -> tuple[list[float], dict[str, list[str]]]:
    """The reward of each epoch, and the messages of each rollout, of the toy run's first two epochs."""
    config = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
    config["llms"]["policy"] |= {"output_dir": str(directory), **policy}
    config["finetuning"] |= {"num_epochs": 2, "output_dir": str(directory)}
    config["eval"]["general"]["output_dir"] = str(directory / "eval")
    directory.mkdir()
    path = directory / "config.yml"
    path.write_text(yaml.safe_dump(config))
    done = run_nat("finetune", "--config_file", str(path))
    assert done.code == 0, done.text[-3000:]
    (run,) = directory.glob("run-*")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rewards = [line["reward_mean"] for line in lines if "reward_mean" in line]
    said = {}
    for file in sorted((run / "rollouts").iterdir()):
        with gzip.open(file, "rt") as rollouts:
            for rollout in map(json.loads, rollouts):
                said[rollout["trajectory_id"]] = [step["message"] for step in rollout["steps"]]
    return rewards, said


def test_rollouts_and_rewards_are_those_of_one_process(tmp_path: Path) -> None:
    rewards, said = finetuned(tmp_path / "plain")
    with_ray, said_with_ray = finetuned(tmp_path / "ray", ray={"replicas": 2})
    assert len(rewards) == 2
    assert len(said) > 512
    # A rounding may turn a token over, and with it what is learned from it.
    assert with_ray == pytest.approx(rewards, abs=0.02)
    assert said_with_ray.keys() == said.keys()
    assert sum(said[name] == said_with_ray[name] for name in said) > 0.95 * len(said)
