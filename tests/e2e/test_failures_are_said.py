"""Acceptance: what fails in a workflow or an evaluator is counted under its reason and said, by the real NAT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nat_process import Finished, json_lines, newest_run

BEHAVIOURS = ("fine", "early", "exit", "long", "refused", "swallow", "broken", "hang")


def plain(text: str) -> str:
    return " ".join(text.split())


def judged_in_a_second(settings: dict[str, Any]) -> None:
    settings["eval"]["evaluators"]["right_team"] = {"_type": "odd_judge"}
    settings["trajectory_builders"]["builder"] |= {"num_generations": 2, "evaluator_timeout": 1}


def test_every_way_to_fail(finetune: Callable[..., Finished], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"  # rows without an answer, in another form than the YAML says
    path.write_text("\n".join(["id,question", *(f"{name},{name}: is it on?" for name in BEHAVIOURS)]))
    done = finetune({"_type": "odd_agent"}, [], "--dataset", str(path), more=judged_in_a_second)
    assert done.code == 0, done.text[-4000:]

    run = newest_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())
    assert summary["trained"] == 6  # fine, early and exit, twice each
    assert summary["dropped"] == {
        "validation": 2 * 4,  # those three and hang, before and after
        "evaluator_error": 2,
        "prompt_too_long": 4,
        "request_refused": 8,  # swallowed or not
    }
    assert summary["trajectories"]["dropped"] == {
        "evaluator_error": 2,
        "prompt_too_long": 2,
        "request_refused": 4,
        "workflow_error": 2,
    }
    epoch = next(row for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch")
    assert (epoch["rollouts"], epoch["failed_rollouts"]) == (16, 12)
    text = plain(done.text)
    for warning in (
        "2 of 16 rollouts failed (prompt_too_long); the first one: BadRequestError: Error code: 400 - the prompt has",
        "4 of 16 rollouts failed (request_refused); the first one: BadRequestError",
        "4 of 16 rollouts failed (workflow_error); the first one: RuntimeError: sys.exit(3) was called",
        "2 of 16 rollouts failed (evaluator_error); the first one: Evaluator error: no score after 1 s; raise eval",
    ):
        assert f"WARNING: {warning}" in text

    (run / "summary.json").unlink()  # as if it had been killed after the epoch
    resume = ("-o", "trainers.trainer.resume", "true")
    done = finetune({"_type": "odd_agent"}, [], "--dataset", str(path), *resume, more=judged_in_a_second)
    assert done.code == 0, done.text[-4000:]
    again = json.loads((run / "summary.json").read_text())
    assert (again["calls"], again["dropped"]) == (summary["calls"], summary["dropped"])

    path.write_text("id,question\nfine,fine: is it on?")
    done = finetune({"_type": "odd_agent"}, [], "--dataset", str(path), *resume, more=judged_in_a_second)
    assert done.code != 0
    last = done.err.rstrip().splitlines()[-1]
    assert "its settings or its data changed (data.dataset.rows: was 8, is 1; data.dataset.sha256: was" in last


def test_a_resumed_run_knows_that_rollouts_have_succeeded_before(
    finetune: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": "1", "question": "ill: is it on?", "answer": "yes"}]
    assert finetune({"_type": "odd_agent"}, rows, more=judged_in_a_second).code == 0
    monkeypatch.setenv("EVSYS_TEST_ILL", "1")
    further = ("-o", "trainers.trainer.resume", "true", "-o", "finetuning.num_epochs", "2")
    done = finetune({"_type": "odd_agent"}, rows, *further, more=judged_in_a_second)
    assert done.code == 0, done.text[-4000:]
    epochs = [row for row in json_lines(newest_run(tmp_path) / "metrics.jsonl") if row["event"] == "epoch"]
    assert [(row["rollouts"], row["failed_rollouts"]) for row in epochs] == [(2, 0), (2, 2)]

    done = finetune({"_type": "odd_agent"}, rows, more=judged_in_a_second)
    assert done.code != 0
    assert "all 2 rollouts failed with the same reward, as did all before them" in plain(done.err)
