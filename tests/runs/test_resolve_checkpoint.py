"""From `checkpoint: none|latest|best|<path>` to a directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nat_plugin_evsys.errors import CheckpointError, ConfigError
from nat_plugin_evsys.runs import RunDirectory, policy_directory, resolve_checkpoint


def run_with(output_dir: Path, rewards: dict[int, float | None], *, trained: bool = True) -> RunDirectory:
    return saved(RunDirectory.create(output_dir), rewards, trained=trained)


def saved(run: RunDirectory, rewards: dict[int, float | None], *, trained: bool = True) -> RunDirectory:
    for epoch, reward in rewards.items():
        path = run.checkpoints_dir / f"epoch-{epoch}"
        path.mkdir()
        (path / "manifest.json").write_text("{}")
        run.record_checkpoint(path.name, epoch, reward, trained=trained)
    run.save_state()
    return run


def test_the_words(tmp_path: Path) -> None:
    run = run_with(tmp_path, {1: 0.5, 2: 0.8, 3: 0.6})
    assert resolve_checkpoint(tmp_path, "none") is None
    assert resolve_checkpoint(tmp_path, "latest") == run.checkpoints_dir / "epoch-3"
    assert resolve_checkpoint(tmp_path, "best") == run.checkpoints_dir / "epoch-2"


def test_a_run_of_several_policies_has_a_checkpoint_of_each(tmp_path: Path) -> None:
    run = run_with(tmp_path, {1: 0.5, 2: 0.8})
    checker = saved(policy_directory(run, "checker", {}), {1: 0.9, 2: 0.1})
    saved(policy_directory(run, "idle", {}), {0: None}, trained=False)
    assert resolve_checkpoint(tmp_path, "latest", {"checker"}.__contains__) == checker.checkpoints_dir / "epoch-2"
    assert resolve_checkpoint(tmp_path, "best", {"checker"}.__contains__) == checker.checkpoints_dir / "epoch-1"
    assert resolve_checkpoint(tmp_path, "best", {"proposer"}.__contains__) == run.checkpoints_dir / "epoch-2"
    with pytest.raises(CheckpointError, match=r"policies/idle has trained nothing .*set checkpoint: none"):
        resolve_checkpoint(tmp_path, "latest", {"idle"}.__contains__)


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path, {1: 0.5})
    monkeypatch.chdir(tmp_path)
    expected = run.checkpoints_dir / "epoch-1"
    assert resolve_checkpoint(Path("elsewhere"), str(expected)) == expected
    assert resolve_checkpoint(Path("."), f"{run.path.name}/checkpoints/epoch-1") == expected
    assert resolve_checkpoint(Path("."), "latest") == expected


def test_no_run_yet_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run under .*: run `nat finetune .*` first, .*checkpoint: none"):
        resolve_checkpoint(tmp_path / "nothing", "latest")


def test_a_run_without_a_checkpoint_does_not_hide_an_older_one(tmp_path: Path) -> None:
    run_with(tmp_path, {1: 0.1})
    old = run_with(tmp_path, {1: 0.9, 2: 0.5})
    run_with(tmp_path, {0: 0.9}, trained=False)
    run_with(tmp_path, {})
    assert resolve_checkpoint(tmp_path, "latest") == old.checkpoints_dir / "epoch-2"
    assert resolve_checkpoint(tmp_path, "best") == old.checkpoints_dir / "epoch-1"


def test_only_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    new = run_with(tmp_path, {})
    with pytest.raises(CheckpointError, match="no checkpoint yet") as caught:
        resolve_checkpoint(tmp_path, "latest")
    assert str(new.path) in str(caught.value)


def test_best_without_rewards(tmp_path: Path) -> None:
    run_with(tmp_path, {1: None})
    with pytest.raises(CheckpointError, match="set checkpoint: latest"):
        resolve_checkpoint(tmp_path, "best")


def test_a_deleted_checkpoint_is_named(tmp_path: Path) -> None:
    run = run_with(tmp_path, {1: 0.5})
    (run.checkpoints_dir / "epoch-1" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"epoch-1.*moved or deleted"):
        resolve_checkpoint(tmp_path, "latest")


def test_a_checkpoint_on_a_service(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.record_checkpoint("epoch-1", 1, 0.5, adapter="tinker://run/sampler_weights/epoch-1")
    run.record_checkpoint("epoch-2", 2, 0.4, adapter="tinker://run/sampler_weights/epoch-2")
    run.save_state()
    assert resolve_checkpoint(tmp_path, "latest") == "tinker://run/sampler_weights/epoch-2"
    assert resolve_checkpoint(tmp_path, "best") == "tinker://run/sampler_weights/epoch-1"
    assert resolve_checkpoint(Path("elsewhere"), "tinker://other/weights/x") == "tinker://other/weights/x"


def test_wrong_paths(tmp_path: Path) -> None:
    run = run_with(tmp_path, {1: 0.5})
    with pytest.raises(CheckpointError, match=r"is a run, not a checkpoint; it has: .*epoch-1"):
        resolve_checkpoint(tmp_path, str(run.path))
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        resolve_checkpoint(tmp_path, str(run.checkpoints_dir))
    with pytest.raises(CheckpointError, match="none, latest, best"):
        resolve_checkpoint(tmp_path, "lastest")
    with pytest.raises(ConfigError, match="checkpoint is empty"):
        resolve_checkpoint(tmp_path, " ")


def test_asking_loads_no_torch_and_no_nat() -> None:
    code = (
        "import sys, nat_plugin_evsys.runs\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'nat', 'pydantic'}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_run_that_trained_nothing_offers_nothing(tmp_path: Path) -> None:
    new = run_with(tmp_path, {0: 0.9, 1: 0.9}, trained=False)
    new.state.status = "failed"
    new.save_state()
    for word in ("latest", "best"):
        with pytest.raises(CheckpointError, match=r"trained nothing \(it is failed\).*checkpoint: none") as caught:
            resolve_checkpoint(tmp_path, word)
        assert str(new.path) in str(caught.value)


def test_a_run_that_trained_later_offers_what_it_trained(tmp_path: Path) -> None:
    run = run_with(tmp_path, {0: 0.1}, trained=False)
    (run.checkpoints_dir / "epoch-1").mkdir()
    (run.checkpoints_dir / "epoch-1" / "manifest.json").write_text("{}")
    run.record_checkpoint("epoch-1", 1, 0.5)
    run.save_state()
    assert resolve_checkpoint(tmp_path, "latest") == run.checkpoints_dir / "epoch-1"
    assert RunDirectory.open(run.path).state.checkpoints[0].trained is False
