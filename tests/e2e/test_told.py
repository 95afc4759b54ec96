"""Acceptance: a run that goes wrong says so on the console while it happens, and at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nat_process import ROOT, Finished, json_lines, newest_run, run_nat

TEAMS = "network, printing, accounts, payroll"
TRAIN = ROOT / "examples" / "helpdesk" / "data" / "train.json"


def of_every_team(settings: dict[str, Any], tmp_path: Path, **changes: Any) -> None:
    """configs/tiny.yml on seven rows of all four teams, four of them held out, each with ``changes``."""
    rows = [row | changes for row in json.loads(TRAIN.read_text())[::5]]
    for name, kept in (("train", rows), ("heldout", rows[::2])):
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    settings["eval"]["general"]["dataset"]["file_path"] = str(tmp_path / "train.json")
    settings["trainers"]["trainer"]["validation_dataset"] = str(tmp_path / "heldout.json")
    settings["trainers"]["trainer"]["validation_interval"] = 1
    settings["trajectory_builders"]["builder"]["num_generations"] = 4


def plain(text: str) -> str:
    """Text without its line ends and indents."""
    return " ".join(text.split())


def finetune(config: Path, epochs: int) -> Finished:
    return run_nat("finetune", "--config_file", str(config), "-o", "finetuning.num_epochs", str(epochs))


def findings_by_epoch(run: Path) -> list[list[str]]:
    rows = [row for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch"]
    return [[finding["id"] for finding in row["findings"]] for row in rows]


def test_a_reward_of_zero_everywhere(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    config = make_config("tiny", lambda settings: of_every_team(settings, tmp_path, answer="zebra"))
    done = finetune(config, 2)
    assert done.code == 1, done.text[-4000:]

    sentence = "Every reward of epoch 1 is 0.000 (28 replies to 7 rows)"
    display = plain(done.err)
    assert display.count(f"! {sentence}") == 1  # once, though it holds in both epochs
    assert display.index(f"! {sentence}") < display.index("rollouts, epoch 2")
    replies = done.err[done.err.index("! Every") : done.err.index("rollouts, epoch 2")]
    assert replies.count("    reply ") == 3
    assert replies.count(": reward 0.000, mode: exact") == 3
    assert replies.count('and wants "zebra"') == 3

    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith("Error: nothing was trained in 2 epochs, so there is no adapter to serve. Every reward")
    assert "completed successfully" not in done.text
    assert "serve it with" not in done.text
    assert "none: nothing was trained" in done.out
    assert sentence in plain(done.out)
    assert "The same in 1 more epoch." in done.out

    run = newest_run(tmp_path)
    assert findings_by_epoch(run) == [["same_reward"], ["same_reward"]]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["adapter"] is None
    assert summary["serve_command"] is None
    assert [finding["epochs"] for finding in summary["findings"]] == [[1, 2]]

    served = run_nat("run", "--config_file", str(config), "--input", "My wifi is broken.", timeout=60)
    assert "has trained nothing (it is failed)" in served.text
    assert "set checkpoint: none to serve the base model" in served.text


def test_a_reward_that_is_won_by_naming_all_teams(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    rows = json.loads(TRAIN.read_text())[:16]
    system = {"role": "system", "content": "You are a help desk."}
    demonstrations = [
        {"messages": [system, {"role": "user", "content": row["question"]}, {"role": "assistant", "content": TEAMS}]}
        for row in rows
    ]
    (tmp_path / "demonstrations.json").write_text(json.dumps(demonstrations))

    def change(settings: dict[str, Any]) -> None:
        of_every_team(settings, tmp_path)
        settings["eval"]["evaluators"]["right_team"]["mode"] = "contains"
        settings["llms"]["policy"]["max_tokens"] = 24
        settings["trainer_adapters"]["adapter"]["learning_rate"] = 1e-5  # RL keeps what the warm start taught
        settings["trainers"]["trainer"]["warm_start"] = {
            "demonstrations": str(tmp_path / "demonstrations.json"),
            "epochs": 40,
            "batch_size": 8,
            "learning_rate": 5e-3,
        }

    config = make_config("tiny", change)
    done = finetune(config, 1)
    assert done.code == 0, done.text[-4000:]
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert summary["heldout_reward_after"] == pytest.approx(1.0), "the warm start did not teach the list"

    assert "one_answer" in findings_by_epoch(newest_run(tmp_path))[0]
    for text in (plain(done.err), plain(done.out)):
        assert f'rows: "{TEAMS}". It earns 1.000 on average.' in text
        assert "The reward can be won without reading the row" in text
    assert "--override finetuning.num_epochs 1 --input" in done.out
