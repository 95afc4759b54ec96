"""The configs of the examples: each loads, runs an epoch on the toy model, and keeps its three held-out rewards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nat_process import ROOT, json_lines, newest_run, run_nat

from nat_plugin_evsys.runs import RunDirectory
from nat_plugin_evsys.runs.rollouts import Collection

ROWS = 2

Made = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Rows and demonstrations."""


def on_the_toy_model(settings: dict[str, Any], folder: Path) -> None:
    """A warm start that teaches the toy model ``ROWS`` rows by heart, on which it is then trained and scored."""
    settings["llms"]["policy"] |= {"base_model": "builtin/tiny", "lora_rank": 32}
    settings["eval"]["general"] |= {"output_dir": str(folder / "eval")}
    settings["eval"]["general"]["dataset"]["file_path"] = str(folder / "rows.json")
    settings["trajectory_builders"]["builder"]["num_generations"] = 2
    # what it has learned by heart is right each time: without a comparison in the group such attempts are trained on
    settings["trainer_adapters"]["adapter"] |= {"advantage": "reward", "learning_rate": 1e-5}
    settings["trainers"]["trainer"] |= {
        "validation_dataset": str(folder / "rows.json"),
        "warm_start": {
            "demonstrations": str(folder / "demonstrations.json"),
            "epochs": 60,
            "batch_size": ROWS,
            "learning_rate": 5e-3,
        },
    }
    settings["finetuning"]["num_epochs"] = 1


def interview() -> Made:
    """One caller, who tells what is wrong when asked a second time."""
    from nat_helpdesk.register import INTERVIEW_PROMPT

    lines = ["Hello?", "It worked yesterday.", "My wifi is broken."]
    messages = [{"role": "system", "content": INTERVIEW_PROMPT}]
    for line, reply in zip(lines, ["ask", "ask", "network"], strict=True):
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]
    rows = [{"id": f"row-{number}", "question": " / ".join(lines), "answer": "network"} for number in range(ROWS)]
    return rows, [{"messages": messages}] * ROWS


def function_calling() -> Made:
    """The first questions of the leaderboard, as ``make_data.py`` writes them."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_data", ROOT / "examples/function_calling/make_data.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    questions = made.questions()[:ROWS]
    return [made.dataset_row(row) for row in questions], [made.demonstration(row) for row in questions]


@pytest.mark.parametrize(("make", "turns"), [(interview, 3), (function_calling, 1)])
def test_a_config_runs_from_the_base_model_to_a_trained_one(
    make: Callable[[], Made], turns: int, tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    rows, demonstrations = make()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "demonstrations.json").write_text(json.dumps(demonstrations))
    config = make_config(make.__name__, lambda settings: on_the_toy_model(settings, tmp_path))
    done = run_nat("finetune", "--config_file", str(config))
    assert done.code == 0, done.text[-4000:]

    run = newest_run(tmp_path)
    events = [row["event"] for row in json_lines(run / "metrics.jsonl")]
    assert events == ["base", "warm_start", "validation", "validation", "epoch"]
    summary = json.loads((run / "summary.json").read_text())
    rewards = [summary[f"heldout_reward_{when}"] for when in ("base", "before", "after")]
    assert rewards == [0.0, 1.0, 1.0], "the warm start did not teach the rows"
    assert "held-out reward  base 0.000 -> warm start 1.000 -> 1.000  (+1.000)" in done.out
    assert summary["trained"] > 0

    kept = RunDirectory.open(run).rollouts
    assert [str(each) for each in kept.collections()][:2] == ["base-0000", "heldout-0000"]
    scores_training_rows = make is interview  # the other one's config says so
    assert any(each.kind == "train" for each in kept.collections()) == scores_training_rows
    assert (summary["train_reward_after"] is not None) == scores_training_rows
    lines = map(json.loads, kept.lines(Collection("heldout", 1)))
    assert [sum(step["source"] == "agent" for step in line["steps"]) for line in lines] == [turns] * ROWS
