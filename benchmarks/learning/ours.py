"""This engine's side: `nat finetune` with the shipped defaults, but for the learning rate that is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from curve import GENERATIONS, GROUPS_PER_STEP, RANK, Point
from tasks import Task

from nat_plugin_evsys.json_lines import read_json_lines


def run(task: Task, rate: float, seed: int, work: Path, epochs: int, **adapter: Any) -> list[Point]:
    """Finetune in a process of its own; the curve is what the run's metrics.jsonl has.

    Args:
        adapter: settings of the trainer adapter that are not the defaults.

    Raises:
        RuntimeError: `nat finetune` failed, with what it printed last.
    """
    config = settings(task, rate, seed, work, epochs)
    config["trainer_adapters"]["adapter"] |= adapter
    exit_code, log = finetune(task, config, work)
    if exit_code:
        raise RuntimeError(log[-3000:])
    return points(run_directory(work), task)


def finetune(task: Task, config: dict[str, Any], work: Path) -> tuple[int, str]:
    """Exit code of a `nat finetune` on the task's rows, and what it printed."""
    for name, rows in (("train", task.train), ("heldout", task.heldout)):
        (work / f"{name}.json").write_text(json.dumps(rows))
    (work / "run.yml").write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).parent / "nat", "finetune", "--config_file", work / "run.yml"]
    done = subprocess.run(
        command, env=environment(work), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def run_directory(work: Path) -> Path:
    """Of the one run below ``work``."""
    return next((work / "runs").glob("run-*"))


def settings(task: Task, rate: float, seed: int, work: Path, epochs: int) -> dict[str, Any]:
    """The YAML."""
    output = str(work / "runs")
    return {
        "llms": {
            "policy": {
                "_type": "evsys_policy",
                "base_model": "builtin/smollm2-135m",
                "output_dir": output,
                "lora_rank": RANK,
                "max_tokens": task.max_tokens,
                "seed": seed,
            }
        },
        "workflow": {"_type": "task_agent", "task": task.name, "llm_name": "policy"},
        "eval": {
            "general": {
                "max_concurrency": 64,
                "output_dir": str(work / "eval"),
                "dataset": {"_type": "json", "file_path": str(work / "train.json")},
            },
            "evaluators": {"reward": {"_type": "task_reward", "task": task.name}},
        },
        "trajectory_builders": {
            "builder": {
                "_type": "evsys_trajectory_builder",
                "num_generations": GENERATIONS,
                "rows_per_epoch": GROUPS_PER_STEP,
            }
        },
        "trainer_adapters": {
            "adapter": {
                "_type": "evsys_trainer_adapter",
                "policy": "policy",
                "learning_rate": rate,
                "shuffle_seed": seed,
            }
        },
        "trainers": {
            "trainer": {
                "_type": "evsys_trainer",
                "validation_dataset": str(work / "heldout.json"),
                "validation_interval": len(task.train) // GROUPS_PER_STEP,
                "seed": seed,
            }
        },
        "finetuning": {
            "enabled": True,
            "trainer": "trainer",
            "trajectory_builder": "builder",
            "trainer_adapter": "adapter",
            "reward_function": {"name": "reward"},
            "num_epochs": epochs * (len(task.train) // GROUPS_PER_STEP),
            "output_dir": output,
        },
    }


def environment(work: Path) -> dict[str, str]:
    """In which ``nat`` discovers ``agent.py`` as an installed package's."""
    installed = work / "plugins" / "tasks-0.dist-info"
    installed.mkdir(parents=True, exist_ok=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tasks\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[nat.plugins]\nagent = agent\n")
    search = [str(work / "plugins"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), "NAT_TELEMETRY_ENABLED": "false"}


def points(run_dir: Path, task: Task) -> list[Point]:
    """The curve of a run directory, by passes over the rows; an epoch of the run is one step."""
    rows = read_json_lines(run_dir / "metrics.jsonl")
    heldout = {row["epoch"]: row["reward"] for row in rows if row["event"] == "validation"}
    epochs = {row["epoch"]: row for row in rows if row["event"] == "epoch"}
    steps = len(task.train) // GROUPS_PER_STEP
    curve, seconds = [], 0.0
    for epoch, reward in sorted(heldout.items()):
        whole = [epochs[step] for step in range(epoch - steps + 1, epoch + 1)] if epoch else []
        seconds += sum(row["seconds"] for row in whole)
        sampled = sum(row["reward_mean"] for row in whole) / steps if whole else None
        curve.append(Point(epoch // steps, reward, sampled, round(seconds, 1)))
    return curve
