"""Acceptance: groups without a signal are rolled out again, up to a bound, and every extra rollout is counted."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nat_process import Finished, json_lines, newest_run

REPS = 4
ROWS = ["mixed", "late", "never"]


def twice_more(settings: dict[str, Any]) -> None:
    settings["eval"]["evaluators"]["right_team"] = {"_type": "moody_judge"}
    settings["trajectory_builders"]["builder"]["dynamic_sampling"] = 2
    settings["trainer_adapters"]["adapter"]["advantage"] = "group_mean"


def test_rows_without_a_signal_are_rolled_out_again(finetune: Callable[..., Finished], tmp_path: Path) -> None:
    rows = [{"id": row, "question": row, "answer": "yes"} for row in ROWS]
    done = finetune({"_type": "speaker", "llm_name": "policy"}, rows, more=twice_more)
    assert done.code == 0, done.text[-4000:]
    assert "12 more rollouts, since all attempts at a row had the same reward" in done.text

    run = newest_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trained"] == 2 * REPS
    replaced = REPS + 2 * REPS  # of `late` once, of `never` twice
    assert summary["dropped"] == {"validation": 6, "replaced_group": replaced, "zero_variance_group": REPS}
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())
    assert summary["trajectories"]["dropped"] == {"replaced_group": replaced, "zero_variance_group": REPS}

    (epoch,) = (row for row in json_lines(run / "metrics.jsonl") if row["event"] == "epoch")
    assert (epoch["rollouts"], epoch["extra_rollouts"]) == (3 * REPS, 3 * REPS)
    assert epoch["reward_mean"] == 2 / (3 * REPS)  # of the rollouts that every row had

    with gzip.open(run / "rollouts" / "epoch-0001.jsonl.gz", "rt") as lines:
        rollouts = [json.loads(line) for line in lines]
    sampled = [
        step["metrics"]["completion_token_ids"] for each in rollouts for step in each["steps"] if "metrics" in step
    ]
    assert epoch["sampled_tokens"] == sum(map(len, sampled)) > 0
    kept = [rollout["extra"] for rollout in rollouts]
    assert Counter((each["row_id"], each.get("dropped")) for each in kept) == {
        ("mixed", None): REPS,
        ("late", "replaced_group"): REPS,
        ("late", None): REPS,
        ("never", "replaced_group"): 2 * REPS,
        ("never", "zero_variance_group"): REPS,
    }
    assert len({(each["row_id"], each["attempt"]) for each in kept}) == len(kept)


def test_every_group_has_a_signal_where_the_advantage_is_the_reward(finetune: Callable[..., Finished]) -> None:
    rows = [{"id": row, "question": row, "answer": "yes"} for row in ROWS]

    def change(settings: dict[str, Any]) -> None:
        twice_more(settings)
        settings["trainer_adapters"]["adapter"]["advantage"] = "reward"

    done = finetune({"_type": "speaker", "llm_name": "policy"}, rows, more=change)
    assert done.code == 1
    assert "remove dynamic_sampling, or set advantage: group_mean" in done.text
