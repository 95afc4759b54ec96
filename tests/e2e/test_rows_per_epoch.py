"""Acceptance: an epoch rolls out some of the rows, a pass all of them, and a resumed run goes on where it was."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nat_process import Finished, json_lines, newest_run

ROWS = [{"id": f"row-{number}", "question": f"Question {number}", "answer": "yes"} for number in range(5)]
REPS = 4


def rows_of(run: Path, epoch: int) -> set[str]:
    with gzip.open(run / "rollouts" / f"epoch-{epoch:04d}.jsonl.gz", "rt") as lines:
        return {json.loads(line)["extra"]["row_id"] for line in lines}


def test_a_pass_over_the_rows_takes_several_epochs(finetune: Callable[..., Finished], tmp_path: Path) -> None:
    def two_rows(settings: dict[str, Any]) -> None:
        settings["trajectory_builders"]["builder"]["rows_per_epoch"] = 2

    for number, resume in (("2", "false"), ("6", "true")):
        options = ["-o", "finetuning.num_epochs", number, "-o", "trainers.trainer.resume", resume]
        done = finetune({"_type": "speaker", "llm_name": "policy"}, ROWS, *options, more=two_rows)
        assert done.code == 0, done.text[-4000:]
    run = newest_run(tmp_path)
    by_epoch = [rows_of(run, epoch) for epoch in range(1, 7)]
    assert [len(rows) for rows in by_epoch] == [2, 2, 1, 2, 2, 1]
    everything = {row["id"] for row in ROWS}
    assert set.union(*by_epoch[:3]) == set.union(*by_epoch[3:]) == everything
    logged = [row for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch"]
    assert [row["rollouts"] for row in logged] == [len(rows) * REPS for rows in by_epoch]
    versions = [row["policy_version"] for row in logged]
    assert versions == sorted(versions)
    assert all(row["staleness"].keys() <= {"0"} for row in logged)  # each on rollouts of the newest policy
