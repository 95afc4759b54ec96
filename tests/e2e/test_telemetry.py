"""Acceptance: NAT's own telemetry works during `nat finetune`, training rollouts included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nat_process import ROOT, first_rows, json_lines, run_nat


def small(settings: dict[str, Any], tmp_path: Path) -> None:
    """configs/tiny.yml on four rows, three attempts each, and two held-out rows."""
    dataset = settings["eval"]["general"]["dataset"]
    train = ROOT / dataset["file_path"]
    dataset["file_path"] = str(first_rows(train, 4, tmp_path / "train.json"))
    held_out = first_rows(train.parent / "heldout.json", 2, tmp_path / "heldout.json")
    settings["trainers"]["trainer"] |= {"validation_dataset": str(held_out), "validation_interval": 1}
    settings["trajectory_builders"]["builder"]["num_generations"] = 3
    settings["trainer_adapters"]["adapter"]["advantage"] = "reward"
    settings["eval"]["evaluators"]["right_team"] |= {"mode": "regex"}
    for name in ("train", "heldout"):
        path = tmp_path / f"{name}.json"
        path.write_text(path.read_text().replace('"answer": "network"', '"answer": ".*"'))
    settings["finetuning"]["num_epochs"] = 2


def test_every_rollout_of_every_epoch_is_in_the_exporters_file(
    tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    trace, log = tmp_path / "trace.jsonl", tmp_path / "nat.log"

    def change(settings: dict[str, Any]) -> None:
        small(settings, tmp_path)
        settings["general"] = {
            "telemetry": {
                "tracing": {"f": {"_type": "file", "output_path": str(trace), "project": "test"}},
                "logging": {"l": {"_type": "file", "path": str(log), "level": "INFO", "mode": "overwrite"}},
            }
        }

    done = run_nat("finetune", "--config_file", str(make_config("tiny", change)))
    assert done.code == 0, done.text[-4000:]

    payloads = [line["payload"] for line in json_lines(trace)]
    started = [each for each in payloads if each["event_type"] == "WORKFLOW_START"]
    runs = Counter(each["metadata"]["provided_metadata"]["workflow_run_id"].split("/")[0] for each in started)
    assert runs == {"epoch-0000": 12, "epoch-0001": 12, "train": 8, "heldout": 6}
    events = Counter(each["event_type"] for each in payloads)
    assert events["WORKFLOW_END"] == events["LLM_START"] == events["LLM_END"] == len(started) == 38

    # the log of the whole run, not of its last evaluation alone
    lines = log.read_text()
    assert "run directory: " in lines
    assert "Cleaning up" not in lines


def test_a_file_that_would_begin_anew_with_each_rollout_is_refused(
    tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    def change(settings: dict[str, Any]) -> None:
        small(settings, tmp_path)
        exporter = {"_type": "file", "output_path": str(tmp_path / "t.jsonl"), "project": "test", "mode": "overwrite"}
        settings["general"] = {"telemetry": {"tracing": {"f": exporter}}}

    done = run_nat("finetune", "--config_file", str(make_config("tiny", change)))
    assert done.code != 0
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith("Error: general.telemetry.tracing.f: ")
    assert "set `mode: append`" in last
