"""`nat evsys …`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nat_plugin_evsys.cli import options
from nat_plugin_evsys.cli import runs as cli
from nat_plugin_evsys.config.policy import DEFAULT_OUTPUT_DIR
from nat_plugin_evsys.report.metrics_log import MetricsLog
from nat_plugin_evsys.report.summary import RunSummary
from nat_plugin_evsys.runs import RunDirectory


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.evsys, [str(argument) for argument in arguments])


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    RunDirectory.create(tmp_path)
    run = RunDirectory.create(tmp_path)
    run.state.status = "finished"
    run.state.epochs_done = 2
    run.state.heldout_reward_before, run.state.heldout_reward_after = 0.1, 0.6
    run.record_checkpoint("epoch-2", 2, 0.6)
    run.save_state()
    MetricsLog(run.metrics_path).append("epoch", 1, reward_mean=0.5)
    RunSummary(0.1, 0.5, 0.1, 0.6, 9.0, 4, 3, {"zero_variance": 1}, "adapter").write(run.summary_path)
    return tmp_path


def test_runs_lists_epochs_rewards_and_adapter(output_dir: Path) -> None:
    result = call("runs", "--output_dir", output_dir)
    first, second = result.output.splitlines()
    assert "running  0 epochs  no adapter" in first
    assert "finished  2 epochs  held-out 0.100 -> 0.600" in second
    assert second.endswith("checkpoints/epoch-2")


def test_one_bad_run_hides_no_other(output_dir: Path) -> None:
    bad = RunDirectory.create(output_dir)
    bad.state_path.write_text("{")
    first, second, third = call("runs", "--output_dir", output_dir).output.splitlines()
    assert "running" in first
    assert "finished" in second
    assert third.startswith(f"{bad.path.name}  unreadable: {bad.state_path} cannot be read")


def test_show_prints_the_summary_of_the_latest_run_or_a_named_one(output_dir: Path) -> None:
    newest, path = call("show", "--output_dir", output_dir), RunDirectory.newest(output_dir)
    assert path is not None
    assert newest.output.splitlines()[-1] == str(path.summary_path)
    assert "3 trained, 1 dropped (zero_variance 1)" in newest.output
    assert call("show", "--output_dir", output_dir, path.path.name).output == newest.output
    assert call("show", path.path).output == newest.output


def test_show_of_an_unfinished_run(output_dir: Path) -> None:
    run = RunDirectory.all(output_dir)[0]
    run.state.status, run.state.error = "failed", "the loss was not finite"
    run.save_state()
    result = call("show", run.path)
    assert "failed  0 epochs" in result.output
    assert "the loss was not finite" in result.output


def test_plot_draws_from_the_metrics(output_dir: Path) -> None:
    result = call("plot", "--output_dir", output_dir, "--output", output_dir / "curve.png")
    assert result.exit_code == 0
    assert (output_dir / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_latest_says_that_a_newer_run_was_interrupted(output_dir: Path) -> None:
    interrupted = RunDirectory.create(output_dir)
    interrupted.state.status = "interrupted"
    interrupted.save_state()
    result = call("show", "--output_dir", output_dir)
    assert "3 trained, 1 dropped" in result.stdout
    assert f"without a trained epoch: {interrupted.path.name} (interrupted after 0 epochs)" in result.stderr
    assert call("show", "--output_dir", output_dir, interrupted.path.name).stderr == ""


def test_the_yaml_names_the_directory_of_the_runs(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yml = output_dir / "my.yml"
    yml.write_text("finetuning: {output_dir: '${RUNS}'}")
    monkeypatch.setenv("RUNS", str(output_dir))
    for command in ("runs", "show", "plot", "report"):
        assert call(command, "--config_file", yml).output == call(command, "--output_dir", output_dir).output, command
    both = call("show", "--config_file", yml, "--output_dir", output_dir)
    assert both.exit_code == 2
    assert "remove --output_dir" in both.output


def test_status_of_a_yaml_without_a_server(tmp_path: Path) -> None:
    yml = tmp_path / "my.yml"
    yml.write_text("llms: {policy: {_type: evsys_policy, base_model: builtin/tiny}}")
    refused = call("status", "--config_file", yml)
    assert refused.exit_code == 1
    assert "no evsys_policy has a base_url" in refused.output
    yml.write_text("llms: {policy: {_type: evsys_policy, base_url: 'http://127.0.0.1:9'}}")
    assert "no answer from http://127.0.0.1:9" in call("status", "--config_file", yml).output


@pytest.mark.parametrize("command", ["status", "show"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("[1, 2]", "must be a mapping"),
        ("llms: 3\nfinetuning: 3", "must be a mapping, got 3"),
        ("llms: {policy: 3}\nfinetuning: [a]", "must be a mapping, got "),
    ],
)
def test_a_yaml_of_another_shape_is_one_readable_line(tmp_path: Path, command: str, text: str, said: str) -> None:
    yml = tmp_path / "my.yml"
    yml.write_text(text)
    refused = call(command, "--config_file", yml)
    assert isinstance(refused.exception, SystemExit)
    assert refused.output.startswith(f"Error: --config_file {yml}: ")
    assert said in refused.output


@pytest.mark.parametrize("command", ["runs", "show", "plot"])
def test_no_run_is_one_readable_line(tmp_path: Path, command: str) -> None:
    result = call(command, "--output_dir", tmp_path)
    assert result.exit_code == 1
    assert result.output.startswith("Error: no run under")
    assert len(result.output.splitlines()) == 1


def test_the_default_is_the_policys_own() -> None:
    assert Path(options.DEFAULT_OUTPUT_DIR) == DEFAULT_OUTPUT_DIR
