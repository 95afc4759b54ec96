"""Acceptance: the real NAT trains workflows whose LLM clients are none of NAT's, or says what to type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from nat_process import Finished, newest_run, run_nat

CLIENTS = ("openai", "requests", "langchain", "urllib")


def test_every_client_belongs_to_its_rollout(finetune: Callable[..., Finished], tmp_path: Path) -> None:
    rows = [{"id": name, "question": f"{name}: is it on?", "answer": "yes"} for name in CLIENTS]
    done = finetune({"_type": "raw_agent"}, rows)
    assert done.code == 0, done.text[-4000:]
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert summary["trained"] == 4 * len(CLIENTS)
    assert summary["dropped"] == {"validation": 2 * len(CLIENTS)}
    assert summary["calls"] == 6 * len(CLIENTS)


def test_calls_that_belong_to_no_rollout_end_the_run(finetune: Callable[..., Finished], tmp_path: Path) -> None:
    rows = [{"id": str(number), "question": f"Is it {number}?", "answer": "yes"} for number in range(3)]
    done = finetune({"_type": "raw_agent", "client": "thread"}, rows)
    assert done.code == 1
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith("Error: none of the 3 calls that 3 rollouts made of the policy")
    assert "policy_endpoint()" in last
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert (summary["status"], f"Error: {summary['error']}") == ("failed", last)
    assert (summary["calls"], summary["dropped"]) == (3, {"unattributed": 3})
    assert summary["trajectories"] == {"trained": 0, "dropped": {}}, (
        "those that measure the policy are none to train on"
    )
    assert summary["error"] in (newest_run(tmp_path) / "report.html").read_text()


def test_all_rollouts_fail_then_the_run_stops_after_the_first_batch(
    finetune: Callable[..., Finished], tmp_path: Path
) -> None:
    rows = [{"id": str(number), "question": "broken: why?", "answer": "yes"} for number in range(2)]
    done = finetune({"_type": "raw_agent"}, rows)
    assert done.code == 1
    first = "the first one: ConnectionError: the ticket system is down"
    assert f"WARNING: 2 of 2 rollouts failed (workflow_error); {first}" in " ".join(done.text.split())
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith("Error: all 8 rollouts failed with the same reward"), done.text[-3000:]
    assert first in last
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert (summary["status"], f"Error: {summary['error']}") == ("failed", last)
    assert (summary["adapter"], summary["serve_command"], summary["trained"]) == (None, None, 0)
    assert summary["calls"] == sum(summary["dropped"].values()) == 10
    assert summary["dropped"] == {"validation": 2, "zero_variance_group": 8}
    assert summary["trajectories"]["dropped"] == {"zero_variance_group": 8}


def test_some_rollouts_fail_and_it_is_said(finetune: Callable[..., Finished], tmp_path: Path) -> None:
    rows = [{"id": name, "question": f"{name}: is it on?", "answer": "yes"} for name in ("openai", "broken")]
    done = finetune({"_type": "raw_agent"}, rows)
    assert done.code == 0, done.text[-3000:]
    assert "WARNING: 4 of 8 rollouts failed (workflow_error); the first one: Con" in " ".join(done.text.split())
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())


@pytest.mark.parametrize("command", ["run", "eval"])
@pytest.mark.parametrize("workflow", ["chat_completion", "raw_agent"])
def test_nothing_to_serve_is_an_error_at_the_start(
    command: str, workflow: str, make_config: Callable[..., Path], agents: dict[str, str]
) -> None:
    config = make_config("tiny", lambda settings: settings.update(workflow={"_type": workflow, "llm_name": "policy"}))
    options = ["--input", "My wifi is broken."] if command == "run" else []
    done = run_nat(command, "--config_file", str(config), *options, timeout=120, **agents)
    assert done.code != 0, done.text[-3000:]
    assert "run `nat finetune --config_file …` first, or set checkpoint: none to serve the base model" in done.text
    assert "sorry" not in done.out.lower()
