"""The run directory: create, find, commit, record, prune, resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nat_plugin_evsys.errors import CheckpointError, ConfigError, RunLostError
from nat_plugin_evsys.runs import RunDirectory, changed_settings, redact

CONFIG: dict[str, Any] = {
    "general": {"telemetry": {"logging": {"level": "info"}}},
    "llms": {
        "policy": {"_type": "evsys_policy", "lora_rank": 8, "max_tokens": 64, "checkpoint": "latest", "port": 0},
        "judge": {"_type": "openai", "api_key": "sk-verysecretverysecret", "base_url": "https://me:pw@host/v1"},
    },
    "trainers": {"t": {"_type": "evsys_trainer", "resume": False, "seed": 0}},
    "finetuning": {"num_epochs": 4, "target_model": None},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    *parents, last = path.split(".")
    part = config
    for key in parents:
        part = part.setdefault(key, {})
    part[last] = value
    return config


def save_checkpoint(run: RunDirectory, name: str) -> Path:
    path = run.checkpoints_dir / name
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return path


def test_create_makes_the_directory_and_points_latest_at_it(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path / "new" / "runs", CONFIG)
    second = RunDirectory.create(tmp_path / "new" / "runs", CONFIG)
    assert first.path != second.path
    assert second.checkpoints_dir.is_dir()
    assert (tmp_path / "new" / "runs" / "latest").read_text().strip() == second.path.name
    newest = RunDirectory.newest(tmp_path / "new" / "runs")
    assert newest is not None
    assert newest.path == second.path
    assert [run.path for run in RunDirectory.all(tmp_path / "new" / "runs")] == [first.path, second.path]


def test_many_runs_within_a_second_keep_their_order(tmp_path: Path) -> None:
    made = [RunDirectory.create(tmp_path).path for _ in range(12)]
    assert [run.path for run in RunDirectory.all(tmp_path)] == made


def test_newest_without_the_pointer_file_or_with_a_stale_one(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path)
    second = RunDirectory.create(tmp_path)
    for stale in (None, "run-20000101-000000"):
        (tmp_path / "latest").unlink()
        if stale:
            (tmp_path / "latest").write_text(stale)
        newest = RunDirectory.newest(tmp_path)
        assert newest is not None
        assert newest.path == second.path
        (tmp_path / "latest").touch()
    assert RunDirectory.newest(tmp_path / "nowhere") is None


def test_an_output_dir_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"finetuning\.output_dir"):
        RunDirectory.create(tmp_path / "file")


def test_state_round_trip(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    run.state.epochs_done = 2
    run.state.tally = {"calls": 9, "trained": 8, "dropped": {"zero_variance": 1}}
    run.state.curriculum = {"included_groups": ["a", 3]}
    run.record_checkpoint("epoch-1", 1, 0.5, training_state=run.checkpoints_dir / "epoch-1-state")
    run.save_state()
    assert RunDirectory.open(run.path).state == run.state
    assert not list(run.path.glob("*.tmp"))


RECORDS = ['[{"name": "a"}]', '[{"name": "a", "epoch": 1, "reward": 0, "adapter": "a", "surprise": 1}]', "[3]", "null"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"format": 99}', '{"format": 1, "surprise": 1}'),
        *(f'{{"format": 1, "checkpoints": {records}}}' for records in RECORDS),
    ],
)
def test_a_state_that_is_not_ours_is_refused_by_name(tmp_path: Path, text: str) -> None:
    run = RunDirectory.create(tmp_path)
    run.state_path.write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        RunDirectory.open(run.path)


def test_config_is_written_without_its_secrets(tmp_path: Path) -> None:
    config = changed("llms.judge.default_headers", {"Authorization": "Bearer abc", "X-Api-Key": "k", "Accept": "a"})
    config["llms"]["judge"]["extra"] = "curl -H 'Bearer tok123' and hf_abcdefghijklmnopqrstuv"
    run = RunDirectory.create(tmp_path, config)
    text = run.config_path.read_text()
    for secret in ("sk-very", "pw@", "abc", "tok123", "hf_abc"):
        assert secret not in text, secret
    written = yaml.safe_load(text)
    assert written["llms"]["policy"]["max_tokens"] == 64
    assert written["llms"]["judge"]["default_headers"] == {
        "Authorization": "<redacted>",
        "X-Api-Key": "<redacted>",
        "Accept": "a",
    }
    assert written["llms"]["judge"]["base_url"] == "https://<redacted>@host/v1"
    assert "sk-very" not in run.state_path.read_text()


def test_redact_finds_lists_nested_values_and_keys_of_this_server() -> None:
    config = {
        "api_keys": ["hunter2"],
        "refresh_tokens": ["hunter2"],
        "passwords": {"alice": "hunter2"},
        "secret": {"value": "hunter2", "of": [{"each": "hunter2"}], "rotated": True},
        "command": "nat evsys status --api-key tml-hunter2hunter2",
    }
    redacted = redact(config)
    assert "hunter2" not in str(redacted)
    assert redacted["secret"] == {"value": "<redacted>", "of": [{"each": "<redacted>"}], "rotated": True}


def test_redact_leaves_words_that_only_look_like_secrets() -> None:
    config = {"max_tokens": 5, "tokenizer": "t", "keyword": "k", "answer_key": None, "token": "", "monkey": "m"}
    config |= {"special_tokens": "text", "key_env": "TINKER_API_KEY", "note": "TINKER_API_KEY=tml-local"}
    assert redact(config) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("finetuning.num_epochs", 9),
        ("trainers.t.resume", True),
        ("trainers.t.progress", "plain"),
        ("llms.policy.checkpoint", "none"),
        ("llms.policy.port", 8000),
        ("general.telemetry.logging.level", "debug"),
        ("llms.judge.api_key", "sk-anothersecretanother"),
        ("finetuning.reward_function", None),
    ],
)
def test_resume_allows_what_does_not_change_the_result(tmp_path: Path, path: str, value: Any) -> None:
    created = RunDirectory.create(tmp_path, CONFIG)
    RunDirectory.open(created.path).check_config(changed(path, value))


def test_resume_refuses_other_changes_and_lists_them(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    config = changed("llms.policy.lora_rank", 16)
    config["finetuning"]["target_model"] = "x"
    del config["trainers"]["t"]["seed"]
    with pytest.raises(ConfigError) as caught:
        RunDirectory.open(run.path).check_config(config)
    for part in (
        "llms.policy.lora_rank: was 8, is 16",
        'finetuning.target_model: was not set, is "x"',
        "trainers.t.seed: was 0, is not set",
        "resume: false",
    ):
        assert part in str(caught.value)
    assert len(changed_settings(CONFIG, config)) == 3


def test_resume_discards_what_an_interrupted_epoch_left(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    done, state, stray = (save_checkpoint(run, name) for name in ("epoch-1", "state/epoch-1", "epoch-2"))
    run.record_checkpoint("epoch-1", 1, None, training_state=state)
    run.save_state()
    resumed = RunDirectory.open(run.path)
    assert resumed.discard_unrecorded() == [stray]
    assert done.is_dir()
    assert state.is_dir()
    assert not stray.exists()
    assert [record.epoch for record in resumed.state.checkpoints] == [1]


def test_resume_removes_temporaries_of_a_killed_writer_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    kept = save_checkpoint(run, "epoch-1")
    run.record_checkpoint("epoch-1", 1, None)
    run.save_state()
    for left in ("checkpoints/.epoch-2.tmp-0123456789ab", "checkpoints/sampler_weights/.x.old-0123456789ab"):
        (run.path / left / "deep").mkdir(parents=True)
    (run.path / ".state.json.tmp-0123456789ab").write_text("{")
    (run.path / ".mine").write_text("a user's own")
    before = {path for path in run.path.rglob("*") if "-0123456789ab" not in str(path)}
    RunDirectory.open(run.path).discard_unrecorded()
    assert set(run.path.rglob("*")) == before
    assert kept.is_dir()


def committed(tmp_path: Path, epochs: int) -> RunDirectory:
    """A run with a checkpoint of each of these epochs."""
    run = RunDirectory.create(tmp_path, CONFIG)
    for epoch in range(epochs + 1):
        save_checkpoint(run, f"epoch-{epoch}")
        run.state.epochs_done = epoch
        run.record_checkpoint(f"epoch-{epoch}", epoch, epoch / 10)
        run.prune(2)
    return run


def test_a_torn_state_is_named_and_the_one_before_is_taken_when_asked(tmp_path: Path) -> None:
    run = committed(tmp_path, 4)
    assert run.history.epochs() == [4, 3, 2]
    (run.path / "states" / "epoch-0004.json").write_text("")
    run.state_path.write_text('{"format": 1, "epo')
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read.*of epoch 3;.*resume: previous"):
        RunDirectory.newest(tmp_path)
    older = RunDirectory.newest(tmp_path, previous=True)
    assert older is not None
    assert older.state.epochs_done == 3
    assert [record.epoch for record in older.state.checkpoints] == [1, 2, 3]
    assert older.forget_missing() == ["epoch-1"]
    assert older.state.best_epoch == 3


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, torn, last = (RunDirectory.create(tmp_path) for _ in range(3))
    torn.state_path.write_text("{")
    assert [run.path for run in RunDirectory.all(tmp_path)] == [first.path, last.path]
    assert f"{torn.state_path} cannot be read" in caplog.text


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_that_was_deleted_under_its_process_is_not_written_again(tmp_path: Path, replaced: bool) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    run.save_state()
    shutil.rmtree(run.path)
    if replaced:
        run.checkpoints_dir.mkdir(parents=True)
        (run.path / ".lock").touch()
    with pytest.raises(RunLostError, match="was deleted or moved"):
        run.save_state()
    assert not run.state_path.exists()


def test_two_processes_never_write_to_one_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    code = (
        "import sys; from nat_plugin_evsys.runs import RunDirectory\n"
        "try: RunDirectory.open(sys.argv[1]).lock(); print('resumed')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    held = subprocess.run(command, capture_output=True, text=True, check=True)
    assert held.stdout.startswith("ConfigError")
    assert "in use by another process" in held.stdout
    run.unlock()
    free = subprocess.run(command, capture_output=True, text=True, check=True)
    assert free.stdout.strip() == "resumed"


def test_prune_keeps_last_best_and_the_newest_others(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    for epoch, reward in enumerate([0.1, 0.9, 0.2, 0.3, 0.9, 0.4, 0.5], start=1):
        save_checkpoint(run, f"epoch-{epoch}")
        state = save_checkpoint(run, f"epoch-{epoch}-state")
        run.record_checkpoint(f"epoch-{epoch}", epoch, reward, training_state=state)
    assert (run.state.best_epoch, run.state.best_reward) == (2, 0.9)
    assert run.prune(2) == ["epoch-1", "epoch-3", "epoch-4"]
    left = sorted(path.name for path in run.checkpoints_dir.iterdir())
    assert left == sorted(f"epoch-{epoch}{end}" for epoch in (2, 5, 6, 7) for end in ("", "-state"))
    assert [record.epoch for record in RunDirectory.open(run.path).state.checkpoints] == [2, 5, 6, 7]
    assert run.prune(2) == []


def test_what_a_run_began_with_is_the_best_only_if_something_trained_was_measured_too(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.record_checkpoint("epoch-0", 0, 0.5, trained=False)
    assert run.state.best_epoch == 0
    run.record_checkpoint("epoch-1", 1, None)
    assert run.state.best_epoch is None
    run.record_checkpoint("epoch-1", 1, 0.4)
    assert run.state.best_epoch == 0


def test_prune_keeps_what_a_run_began_with_while_nothing_trained_was_measured(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.record_checkpoint("epoch-0", 0, 0.6, trained=False)
    for epoch in range(1, 5):
        run.record_checkpoint(f"epoch-{epoch}", epoch, None)
        run.prune(2)
    run.record_checkpoint("epoch-5", 5, 0.2)
    assert [record.epoch for record in run.state.checkpoints] == [0, 2, 3, 4, 5]
    assert run.state.best_epoch == 0


def test_prune_deletes_nothing_outside_of_the_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs")
    outside = tmp_path / "mine"
    outside.mkdir()
    for epoch in (1, 2, 3):
        run.record_checkpoint(f"epoch-{epoch}", epoch, float(epoch), adapter=outside)
    assert run.prune(0) == ["epoch-1", "epoch-2"]
    assert outside.is_dir()


def test_recording_an_epoch_again_replaces_it(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.record_checkpoint("epoch-1", 1, 0.9)
    run.record_checkpoint("epoch-1", 1, 0.2)
    assert [record.reward for record in run.state.checkpoints] == [0.2]
    assert run.state.best_reward == 0.2


def test_a_run_that_was_moved_still_finds_its_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a")
    run.record_checkpoint("epoch-1", 1, 0.9)
    run.save_state()
    os.rename(tmp_path / "a", tmp_path / "b")
    moved = RunDirectory.newest(tmp_path / "b")
    assert moved is not None
    assert (
        moved.locate(moved.state.checkpoints[0].adapter) == tmp_path / "b" / run.path.name / "checkpoints" / "epoch-1"
    )
