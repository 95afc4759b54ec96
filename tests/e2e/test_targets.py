"""Acceptance: `target_functions` and a frozen second policy decide which calls the real NAT's run trains on."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nat_process import Finished, newest_run


def three_speakers(settings: dict[str, Any]) -> None:
    """A planner of a frozen policy, and a critic and a solver of the policy under training; the solver is trained."""
    llms = settings["llms"]
    llms["frozen"] = {**llms["policy"], "checkpoint": "none"}
    settings["functions"] = {
        name: {"_type": "speaker", "llm_name": llm}
        for name, llm in (("planner", "frozen"), ("critic", "policy"), ("solver", "policy"))
    }
    settings["finetuning"] |= {"target_functions": ["solver"], "target_model": "policy"}


def test_only_the_targeted_function_of_the_trained_policy_learns(
    finetune: Callable[..., Finished], tmp_path: Path
) -> None:
    workflow = {"_type": "relay", "functions": ["planner", "critic", "solver"]}
    rows = [{"id": str(number), "question": f"Is it {number}?", "answer": "yes"} for number in range(2)]
    done = finetune(workflow, rows, more=three_speakers)
    assert done.code == 0, done.text[-4000:]

    run = newest_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    rollouts, measured = 2 * 4, 2 * 2
    assert summary["trained"] == rollouts
    assert summary["dropped"] == {"validation": 2 * measured, "not_targeted": rollouts + rollouts + measured}
    assert summary["calls"] == 3 * (rollouts + measured)

    with gzip.open(run / "rollouts" / "epoch-0001.jsonl.gz", "rt") as lines:
        kept = [json.loads(line) for line in lines]
    calls = [step["extra"] for line in kept for step in line["steps"] if "call_id" in step.get("extra", {})]
    assert Counter((call["functions"][-1], call.get("dropped")) for call in calls) == {
        ("critic", "not_targeted"): rollouts,
        ("solver", None): rollouts,
    }
