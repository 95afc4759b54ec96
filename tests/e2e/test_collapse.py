"""Acceptance: a run whose policy collapses says so, and does what ``on_collapse`` asks."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nat_process import ROOT, Finished, json_lines, newest_run, run_nat
from wandb_file import exit_code, finished_file, history

TRAIN = ROOT / "examples" / "helpdesk" / "data" / "train.json"
WANDB = importlib.util.find_spec("wandb") is not None
RUINOUS = 3.0
"""A learning rate of which a single step leaves nothing of any policy."""


@pytest.fixture
def finetune(tmp_path: Path, make_config: Callable[..., Path]) -> Callable[..., Finished]:
    """``finetune(on_collapse, epochs)``: configs/tiny.yml on seven rows at a ruinous rate."""
    rows = json.loads(TRAIN.read_text())[::5]
    for name, kept in (("train", rows), ("heldout", rows[::2])):
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))

    def finetune(on_collapse: str, epochs: int, *, resume: bool = False) -> Finished:
        def change(settings: dict[str, Any]) -> None:
            settings["eval"]["general"]["dataset"]["file_path"] = str(tmp_path / "train.json")
            settings["trainer_adapters"]["adapter"] |= {
                "learning_rate": RUINOUS,
                "lr_warmup": 0,
                "lr_schedule": "constant",
                "target_kl": None,
            }
            settings["trainers"]["trainer"] |= {
                "validation_dataset": str(tmp_path / "heldout.json"),
                "validation_interval": 1,
                "on_collapse": on_collapse,
                "resume": resume,
                "trackers": ["wandb"] if WANDB else [],
            }

        config = make_config("tiny", change)
        command = ["finetune", "--config_file", str(config), "-o", "finetuning.num_epochs", str(epochs)]
        return run_nat(*command, WANDB_MODE="offline")

    return finetune


def wandb_file(run: Path) -> Path:
    """Of the run's newest process."""
    where = json.loads((run / "summary.json").read_text())["trackers"]["wandb"]["where"]
    return finished_file(Path(shlex.split(where)[-1]))


def epochs_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch"]


def test_stop_ends_the_run_with_an_error_that_names_the_best_checkpoint(
    tmp_path: Path, finetune: Callable[..., Finished]
) -> None:
    done = finetune("stop", 6)
    assert done.code == 1, done.text[-4000:]
    assert "Error: stopped after epoch 2 (on_collapse: stop). " in done.err
    assert "serve the best checkpoint, the policy before the first epoch (reward " in " ".join(done.err.split())
    assert "! " in done.err, "the finding itself was not shown"
    assert "\nFailed after 2 epochs" in f"\n{done.out}"
    assert "serve it with" not in done.out

    run = newest_run(tmp_path)
    first, second = epochs_of(run)
    assert first["trained"] > 0
    assert not any(finding["collapse"] for finding in first["findings"])
    assert any(finding["collapse"] for finding in second["findings"])
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    assert json.loads((run / "state.json").read_text())["status"] == "failed"
    if WANDB:
        assert exit_code(wandb_file(run)) == 1


def test_reload_best_goes_on_from_the_best_checkpoint_at_half_the_rate_also_after_a_resume(
    tmp_path: Path, finetune: Callable[..., Finished]
) -> None:
    done = finetune("reload_best", 2)
    assert done.code == 0, done.text[-4000:]
    assert "reload, epoch-0000, continuing at 0.5 times the learning rate" in " ".join(done.err.split()).replace(
        ":", ","
    )
    run = newest_run(tmp_path)
    assert [row.get("reloaded") for row in epochs_of(run)] == [None, "epoch-0000"]
    weights = [run / "checkpoints" / name / "adapter_model.safetensors" for name in ("epoch-0000", "epoch-0002")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    heldout = [row["reward"] for row in json_lines(run / "metrics.jsonl") if row["event"] == "validation"]
    assert heldout[2] < heldout[0], "the collapsed policy was not measured"
    assert json.loads((run / "summary.json").read_text())["heldout_reward_after"] == heldout[0]

    done = finetune("reload_best", 3, resume=True)
    assert done.code == 0, done.text[-4000:]
    rows = epochs_of(run)
    assert rows[2]["reward_mean"] > rows[1]["reward_mean"]
    rates = [row["job"]["metrics"]["learning_rate"] for row in rows if row["trained"]]
    assert rates[0] == pytest.approx(RUINOUS)
    assert rates[-1] == pytest.approx(RUINOUS / 2)
    if WANDB:  # the step of the resumed part comes after those before the reload
        steps = [row["optimizer_step"] for row in history(wandb_file(run)) if "step/loss_sum" in row]
        assert steps == [sum(row["job"]["metrics"]["steps"] for row in rows if row["trained"])]
