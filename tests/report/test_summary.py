"""summary.json and the text that ends a run."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.report.findings import Finding, FindingId
from nat_plugin_evsys.report.replies import Reply
from nat_plugin_evsys.report.summary import RunSummary, _better, write_anything
from nat_plugin_evsys.runs.state import CheckpointRecord, RunState

SUMMARY = RunSummary(
    train_reward_before=0.25,
    train_reward_after=0.75,
    heldout_reward_before=0.2,
    heldout_reward_after=0.9,
    seconds=83.4,
    calls=100,
    trained=90,
    dropped={"zero_variance": 8, "rollout_timeout": 2},
    adapter="/runs/r/checkpoints/epoch-4",
    trajectories={"trained": 45, "dropped": {"zero_variance": 4, "rollout_timeout": 1}},
    epochs=4,
    serve_command="nat serve --config_file configs/quickstart.yml",
    run_dir="/runs/r",
)


def test_keys_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    data = json.loads(path.read_text())
    required = {"train_reward_before", "train_reward_after", "heldout_reward_before", "heldout_reward_after"}
    required |= {"seconds", "calls", "trained", "dropped", "adapter"}
    assert required <= data.keys()
    assert data["dropped"] == {"zero_variance": 8, "rollout_timeout": 2}
    assert RunSummary.read(path) == SUMMARY


def test_text_tells_everything_and_ends_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    lines = SUMMARY.format(path).splitlines()
    assert lines[-1] == str(path)
    text = "\n".join(lines)
    for part in (
        "0.250 -> 0.750  (+0.500)",
        "0.200 -> 0.900  (+0.700)",
        "45 trained, 5 dropped (zero_variance 4, rollout_timeout 1)",
        "100 made, 90 trained, 10 dropped (zero_variance 8, rollout_timeout 2)",
        "/runs/r/checkpoints/epoch-4",
        "nat serve --config_file configs/quickstart.yml",
        "4 epochs in 83.4 s",
    ):
        assert part in text, part


def test_nothing_that_was_said_can_repaint_the_terminal(tmp_path: Path) -> None:
    reply = Reply("row\x1b[2J", "q\x9b", "e", "text\x9b2J", 0.0, "got \x1b]0;owned\x07", 1, 1, 0)
    finding = Finding(FindingId.SAME_REWARD, 1, "Every reward\x1b[2J", "Look.", [reply])
    findings = [{**finding.to_dict(), "epochs": [1]}]
    failed = replace(SUMMARY, refusals={"the field \x1b[2J": 2}, findings=findings, status="failed", error="\x9b2J")
    text = failed.format(tmp_path / "summary.json")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "2 x: the field ␛[2J" in text
    assert "got ␛]0;owned␇" in text


def test_later_turns(tmp_path: Path) -> None:
    assert "later turns" not in SUMMARY.format(tmp_path)
    assert "malformed" not in SUMMARY.format(tmp_path)
    assert "  malformed calls  3 looked like" in replace(SUMMARY, malformed_calls=3).format(tmp_path)
    counts = {"new": 40, "extended": 49, "changed": 1, "rewritten": 0}
    text = replace(SUMMARY, prompts=counts).format(tmp_path)
    assert "  later turns      98.0% start with the recorded ids (1 changed)\n" in text


def test_a_warm_start_has_three_held_out_rewards(tmp_path: Path) -> None:
    text = replace(SUMMARY, heldout_reward_base=0.05).format(tmp_path / "summary.json")
    assert "held-out reward  base 0.050 -> warm start 0.200 -> 0.900  (+0.850), +0.700 since the warm start" in text


def test_without_a_held_out_dataset(tmp_path: Path) -> None:
    summary = replace(SUMMARY, heldout_reward_before=None, heldout_reward_after=None, adapter=None, dropped={})
    text = summary.format(tmp_path / "summary.json")
    assert "held-out reward  not measured" in text
    assert "none was saved" in text
    assert "90 trained, 0 dropped" in text


def test_a_file_that_is_no_summary(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"calls": 1}')
    with pytest.raises(DataError, match=r"summary\.json is not a run's summary"):
        RunSummary.read(tmp_path / "summary.json")


def test_print_at_exit_comes_after_later_log_lines() -> None:
    code = (
        "import logging; from nat_plugin_evsys.report.summary import print_at_exit\n"
        "logging.basicConfig(level='INFO'); print_at_exit('the\\nlast'); logging.info('after the run'); print('out')"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    assert shown.stdout.splitlines()[-2:] == ["the", "last"]
    assert "after the run" in shown.stdout


def test_a_run_that_trained_nothing_offers_no_adapter(tmp_path: Path) -> None:
    summary = replace(SUMMARY, trained=0, adapter=None, serve_command=None)
    text = summary.format(tmp_path / "summary.json")
    assert "adapter          none: nothing was trained" in text
    assert "serve it with" not in text


def test_a_checkpoint_that_earned_more_than_the_last_one_is_named(tmp_path: Path) -> None:
    assert "better" not in SUMMARY.format(tmp_path)
    records = [CheckpointRecord(f"epoch-{n}", n, reward, f"epoch-{n}") for n, reward in enumerate((0.25, 0.75, 0.0))]
    better = _better(RunState(checkpoints=records))
    assert better == "the policy of epoch 1, whose reward was 0.750 (the last one's is 0.000)"
    line = f"  better           {better}; `checkpoint: best` of the policy serves that one"
    assert line in replace(SUMMARY, better=better).format(tmp_path).splitlines()
    assert _better(RunState(checkpoints=records[:2])) is None
    assert "the policy before the first epoch" in str(_better(RunState(checkpoints=[records[0], records[2]])))


def test_findings_are_said_again_with_one_example_each(tmp_path: Path) -> None:
    examples = [Reply(f"row-{n}", "Wifi?", "network", f"reply {n}", 0.0, "no", 3, 1, 0) for n in range(3)]
    finding = Finding(FindingId.CUT_OFF, 2, "Half of the calls were cut off.", "Raise max_tokens.", examples)
    summary = replace(SUMMARY, findings=[{**finding.to_dict(), "epochs": [2, 3, 7]}])
    summary.write(path := tmp_path / "summary.json")
    assert RunSummary.read(path).format(path) == summary.format(path)
    assert summary.format(path).splitlines()[-6:] == [
        "! Half of the calls were cut off.",
        "  Raise max_tokens.",
        '  row row-0 asks "Wifi?" and wants "network"',
        '    reply "reply 0": reward 0.000, no',
        "  The same in 2 more epochs.",
        str(path),
    ]


def test_a_summary_of_a_run_before_findings_were_kept(tmp_path: Path) -> None:
    data = asdict(SUMMARY)
    del data["findings"]
    (tmp_path / "summary.json").write_text(json.dumps(data))
    assert RunSummary.read(tmp_path / "summary.json") == SUMMARY


def test_every_reason_is_said_in_words_once(tmp_path: Path) -> None:
    trajectories = {"trained": 3, "dropped": {DropReason.ZERO_VARIANCE_GROUP: 4, DropReason.NO_CALLS: 9}}
    dropped = {DropReason.VALIDATION: 5, DropReason.ZERO_VARIANCE_GROUP: 8, "of a later version": 1}
    summary = replace(SUMMARY, trajectories=trajectories, dropped=dropped)
    summary.write(path := tmp_path / "summary.json")
    lines = RunSummary.read(path).format(path).splitlines()
    calls = next(number for number, line in enumerate(lines) if line.startswith("  calls"))
    assert lines[calls].endswith("14 dropped (zero_variance_group 8, validation 5, of a later version 1)")
    assert lines[calls + 1 : calls + 5] == [
        "    no_calls: The workflow ended without a call to the policy, so there is nothing to train on.",
        "    zero_variance_group: All trajectories of the dataset row have the same reward, so none is better than "
        "another.",
        "    validation: The call was made to measure the policy, not to train it.",
        "  adapter          /runs/r/checkpoints/epoch-4",
    ]


def test_a_terminal_without_these_characters_shows_question_marks() -> None:
    bytes_ = io.BytesIO()
    stream = io.TextIOWrapper(bytes_, encoding="ascii")
    write_anything(stream)
    print("…", file=stream, flush=True)
    assert bytes_.getvalue() == b"?\n"
